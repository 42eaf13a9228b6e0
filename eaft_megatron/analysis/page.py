"""The page's HTML, CSS and script; :mod:`eaft_megatron.analysis.html` fills in what stands between @ signs."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --line: #8884; --panel: #8881; --low: 217, 95, 2; --high: 31, 119, 180; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
h1 { font-size: 1.3rem; margin: 0; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; background: white; }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-size: 13px; }
th, td { border: 1px solid var(--line); padding: .15rem .5rem; text-align: left; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; margin: .3rem 0; }
#viewer { display: grid; grid-template-columns: 240px 1fr; gap: 1rem; margin-top: 1rem; }
#list { max-height: 75vh; overflow: auto; border: 1px solid var(--line); }
#list button { display: block; width: 100%; text-align: left; font: inherit; padding: .3rem .5rem; cursor: pointer;
  border: 0; border-bottom: 1px solid var(--line); background: none; color: inherit; }
#list button[aria-current=true] { background: rgba(var(--high), .25); }
#list small { display: block; opacity: .7; }
#tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.8 ui-monospace, monospace; max-height: 68vh;
  overflow: auto; border: 1px solid var(--line); padding: .6rem; margin-top: .5rem; }
#tokens span { border-radius: 3px; cursor: default; }
#tokens .plain { opacity: .55; }
#tokens .conflict { outline: 2px solid rgb(var(--low)); }
#tokens .pinned { box-shadow: 0 0 0 2px currentColor; }
#tip { position: fixed; pointer-events: none; padding: .3rem .5rem; border: 1px solid var(--line); border-radius: 4px;
  background: Canvas; color: CanvasText; font: 12px/1.4 ui-monospace, monospace; white-space: pre; z-index: 1; }
.scale { display: inline-block; width: 9rem; height: .8rem; vertical-align: middle; border: 1px solid var(--line);
  background: linear-gradient(to right, rgba(var(--low), .6), transparent, rgba(var(--high), .6)); }
@media (max-width: 700px) { #viewer { grid-template-columns: 1fr; } #list { max-height: 25vh; } }
</style>
</head>
<body>
<h1>@TITLE@</h1>
@FACTS@
<details><summary>Pictures</summary>@PICTURES@</details>
@TABLES@
<div id="viewer">
<nav id="list" aria-label="samples"></nav>
<main>
<label>Gate <select id="gate"></select></label>
<span>weight 0 <span class="scale"></span> 1 and more</span>
<span>· outlined: confident conflict · pale: not trained on</span>
<div id="tokens" aria-live="polite"></div>
</main>
</div>
<div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="content">@CONTENT@</script>
<script>
"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const list = document.getElementById("list"), tokens = document.getElementById("tokens");
const tip = document.getElementById("tip"), gate = document.getElementById("gate");
let shown = 0, pinned = null;

function weight(sample, i) {
  const w = sample.w[gate.value];
  return typeof w === "number" ? w : w[i];
}
function color(w) {
  return w < 0.5 ? `rgba(217, 95, 2, ${(0.6 * (1 - 2 * w)).toFixed(3)})`
                 : `rgba(31, 119, 180, ${(0.6 * (2 * Math.min(w, 1) - 1)).toFixed(3)})`;
}
function show(index) {
  shown = index;
  pinned = null;
  tip.hidden = true;
  const sample = content.samples[index], conflicts = new Set(sample.conflict);
  const part = document.createDocumentFragment();
  sample.texts.forEach((text, i) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.dataset.i = i;
    if (sample.p[i] === null || !sample.trained[i]) span.className = "plain";
    else {
      span.style.background = color(weight(sample, i));
      if (conflicts.has(i)) span.className = "conflict";
    }
    part.append(span);
  });
  if (sample.texts.length < sample.tokens) part.append(` … ${sample.tokens - sample.texts.length} tokens more`);
  tokens.replaceChildren(part);
  tokens.scrollTop = 0;
  [...list.children].forEach((button, i) => button.setAttribute("aria-current", i === index));
}
function describe(span, x, y) {
  const sample = content.samples[shown], i = Number(span.dataset.i), p = sample.p[i], h = sample.h[i];
  tip.textContent = JSON.stringify(sample.texts[i]) + `  token ${i}\\n` + (p === null ? "nothing predicts it" :
    `p ${p.toPrecision(4)}\\nH ${h.toPrecision(4)} nats\\nw ${weight(sample, i).toPrecision(4)}` +
    (sample.trained[i] ? "" : "\\nnot trained on"));
  tip.hidden = false;
  tip.style.left = Math.min(x + 12, innerWidth - tip.offsetWidth - 4) + "px";
  tip.style.top = Math.min(y + 14, innerHeight - tip.offsetHeight - 4) + "px";
}
content.samples.forEach((sample, index) => {
  const button = document.createElement("button"), note = document.createElement("small");
  button.textContent = `row ${sample.row}`;
  note.textContent = `${sample.tokens} tokens, ${sample.conflict.length} conflicts · ${sample.source}`;
  button.append(note);
  button.addEventListener("click", () => show(index));
  list.append(button);
});
list.addEventListener("keydown", event => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const next = step && list.children[shown + step];
  if (next) { event.preventDefault(); next.focus(); show(shown + step); }
});
tokens.addEventListener("mousemove", event => {
  if (pinned) return;
  if (event.target.dataset.i === undefined) tip.hidden = true;
  else describe(event.target, event.clientX, event.clientY);
});
tokens.addEventListener("mouseleave", () => { if (!pinned) tip.hidden = true; });
tokens.addEventListener("click", event => {
  if (pinned) pinned.classList.remove("pinned");
  pinned = pinned === event.target || event.target.dataset.i === undefined ? null : event.target;
  if (!pinned) { tip.hidden = true; return; }
  pinned.classList.add("pinned");
  describe(pinned, event.clientX, event.clientY);
});
for (const name of content.gates) gate.add(new Option(name));
gate.addEventListener("change", () => show(shown));
if (content.samples.length) show(0);
</script>
</body>
</html>
"""
