"""Messages, and samples as text in which the trained tokens stand between « and »."""


def marked(tokenizer, sample) -> str:
    """The sample's text, its trained tokens between « and »."""
    runs: list[tuple[bool, list[int]]] = []
    for token, flag in zip(sample.input_ids, sample.labels_mask, strict=True):
        if not runs or runs[-1][0] != flag:
            runs.append((flag, []))
        runs[-1][1].append(token)
    return "".join(f"«{tokenizer.decode(run)}»" if flag else tokenizer.decode(run) for flag, run in runs)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, reasoning=None):
    return {"role": "assistant", "content": content, **({"reasoning_content": reasoning} if reasoning else {})}


def result():
    return {"role": "tool", "content": "7°", "tool_call_id": "c"}
