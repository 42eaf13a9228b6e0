"""Trained text by hand for the main families: template -> row -> what each assistant turn trains, in order."""

from __future__ import annotations

_ANSWER = "Narwhal answers."
_LAST = "Okapi answers."
_QWEN_CALL = '<tool_call>\n{"name": "getquux", "arguments": {"city": "Karlovy"}}\n</tool_call><|im_end|>'
_CODER_CALL = (
    "<tool_call>\n<function=getquux>\n<parameter=city>\nKarlovy\n</parameter>\n</function>\n</tool_call><|im_end|>"
)
_GLM_CALL = "\n<tool_call>getquux\n<arg_key>city</arg_key>\n<arg_value>Karlovy</arg_value>\n</tool_call><|observation|>"
_LLAMA_CALL = '{"name": "getquux", "parameters": {"city": "Karlovy"}}<|eot_id|>'
_OSS_FINAL = "<|channel|>final<|message|>"
_OSS_CALL = ' to=functions.getquux<|channel|>commentary json<|message|>{"city": "Karlovy"}<|call|>'
_OSS_THINKING = "<|channel|>analysis<|message|>Civet thinks.<|end|><|start|>assistant"
_NEMO_CALL = '[TOOL_CALLS][{"name": "getquux", "arguments": {"city": "Karlovy"}, "id": "callid001"}]</s>'
_CHATML = [f"{_ANSWER}<|im_end|>"]
_CHATML_CALL = [_QWEN_CALL, f"{_LAST}<|im_end|>"]

GOLDENS: dict[str, dict[str, list[str]]] = {
    "tests/qwen2.5-instruct": {"single": _CHATML, "one call": _CHATML_CALL},
    "tests/qwen3": {
        "single": _CHATML,
        "one call": _CHATML_CALL,
        "reasoning": [f"<think>\nCivet thinks.\n</think>\n\n{_ANSWER}<|im_end|>"],
    },
    "trl/qwen3_instruct_2507": {"single": _CHATML, "one call": _CHATML_CALL},
    "xinference/Qwen3-Next-Thinking": {"reasoning": [f"Civet thinks.\n</think>\n\n{_ANSWER}<|im_end|>"]},
    "llama.cpp/Qwen3-Coder": {"single": _CHATML, "one call": [_CODER_CALL, f"{_LAST}<|im_end|>"]},
    "llama.cpp/Qwen3.5-4B": {"single": _CHATML, "reasoning": [f"Civet thinks.\n</think>\n\n{_ANSWER}<|im_end|>"]},
    "tests/glm-4-0414": {
        "single": [f"\n{_ANSWER}<|user|>"],
        "one call": ['getquux \n{"city": "Karlovy"}<|observation|>', f"\n{_LAST}<|user|>"],
    },
    "llama.cpp/GLM-4.6": {
        "single": [f"\n{_ANSWER}<|user|>"],
        "one call": [_GLM_CALL, f"\n{_LAST}<|user|>"],
        "reasoning": [f"\n<think>Civet thinks.</think>\n{_ANSWER}<|user|>"],
    },
    "llama.cpp/meta-llama-Llama-3.1-8B-Instruct": {
        "single": [f"{_ANSWER}<|eot_id|>"],
        "one call": [_LLAMA_CALL, f"{_LAST}<|eot_id|>"],
    },
    "llama.cpp/deepseek-ai-DeepSeek-V3.1": {"single": [f"{_ANSWER}<｜end▁of▁sentence｜>"]},
    "llama.cpp/openai-gpt-oss-120b": {
        "single": [f"{_OSS_FINAL}{_ANSWER}<|return|>"],
        "one call": [_OSS_CALL, f"{_OSS_FINAL}{_LAST}<|return|>"],
        "reasoning": [f"{_OSS_THINKING}{_OSS_FINAL}{_ANSWER}<|return|>"],
    },
    "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407": {
        "single": [f"{_ANSWER}</s>"],
        "one call": [_NEMO_CALL, f"{_LAST}</s>"],
    },
    "trl/gemma3": {"single": [f"{_ANSWER}<end_of_turn>"]},
    "llama.cpp/moonshotai-Kimi-K2": {"single": _CHATML},
    "llama.cpp/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": {"single": _CHATML},
    "llama.cpp/MiniMax-M2": {"reasoning": [f"Civet thinks.\n</think>\n\n{_ANSWER}[e~["]},
    "llama.cpp/HuggingFaceTB-SmolLM3-3B": {"single": _CHATML},
}
