"use strict";
// Everything that a model wrote goes through textContent: no string ever becomes markup.
const { samples, pictures, marks, kinds } = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const form = document.getElementById("filters"), list = document.getElementById("samples");
const count = document.getElementById("count"), more = document.getElementById("more");

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const number = (value) => (value === null ? "–" : String(Number(value.toPrecision(4))));
const options = (name, values) =>
  element("select", { name }, ...values.map(([value, text]) => element("option", { value, textContent: text })));

const low = (key) => (sample) => sample[key] ?? Infinity;
const high = (key) => (sample) => -(sample[key] ?? -Infinity);
const ORDERS = {
  "newest first": high("step"),
  "oldest first": low("step"),
  "longest first": high("tokens"),
  "shortest first": low("tokens"),
  "highest reward first": high("total"),
  "lowest reward first": low("total"),
  "highest advantage first": high("advantage"),
  "lowest advantage first": low("advantage"),
  "reward model: highest first": high("model"),
  "reward model: lowest first": low("model"),
  "oldest policy first": high("age"),
  "most false claims first": high("false_claims"),
};
const steps = samples.map((sample) => sample.step);

form.append(
  element("input", { name: "text", type: "search", placeholder: "text in question, answer, truth, id" }),
  options("split", [["", "training and evaluation"], ["train", "training"], ["eval", "evaluation"]]),
  options("kind", [["", "every kind"], ...kinds.map((kind) => ["=" + kind, kind])]),
  options("right", [["", "right and wrong"], ["right", "right"], ["wrong", "wrong"]]),
  element("label", {}, "steps", element("input", { name: "from", type: "number", value: Math.min(...steps) })),
  element("label", {}, "to", element("input", { name: "to", type: "number", value: Math.max(...steps) })),
  options("order", Object.keys(ORDERS).map((name) => [name, name])),
  ...marks.map((name) => element("label", {}, element("input", { type: "checkbox", name: "mark", value: name }), name)),
);

let found = [], shown = 0;

function select() {
  const wanted = new FormData(form), text = wanted.get("text").toLowerCase(), kind = wanted.get("kind");
  const ticked = wanted.getAll("mark"), right = wanted.get("right"), split = wanted.get("split");
  const from = Number(wanted.get("from") || -Infinity), to = Number(wanted.get("to") || Infinity);
  found = samples.filter(
    (one) =>
      (!split || one.split === split) &&
      (!kind || "=" + one.kind === kind) &&
      (!right || (one.rule !== null && one.rule >= 1 === (right === "right"))) &&
      one.step >= from &&
      one.step <= to &&
      ticked.every((name) => one.marks.includes(name)) &&
      (!text || [one.question, one.text, one.truth, one.id, one.error].some((s) => s && s.toLowerCase().includes(text))),
  );
  const key = ORDERS[wanted.get("order")];
  const order = (a, b) => (a < b ? -1 : a > b ? 1 : 0); // Infinity - Infinity is no number
  found.sort((a, b) => order(key(a), key(b)) || b.step - a.step || order(a.id, b.id) || a.index - b.index);
  list.replaceChildren();
  shown = 0;
  show();
}

function show() {
  list.append(...found.slice(shown, shown + PAGE).map(card));
  shown = Math.min(found.length, shown + PAGE);
  count.textContent = `${found.length} of ${samples.length} samples on this page fit; ${shown} are shown`;
  more.hidden = shown === found.length;
}

function card(one) {
  const numbers = element("div", { className: "numbers" });
  const add = (name, value) => numbers.append(element("span", {}, name + " ", element("b", { textContent: value })));
  for (const [name, score] of Object.entries(one.rules)) add("rule " + name, number(score));
  for (const name of ["rule", "format", "model", "total", "advantage", "rule_advantage"])
    add(name.replace("_", " "), number(one[name]));
  add("answer found", one.answer ?? "none");
  add("tokens", one.tokens);
  add("version", one.version);
  add("age", one.age);
  if (one.claims !== null) add("false claims", `${one.false_claims} of ${one.claims}`);

  const where = `${one.split} step ${one.step} · ${one.id}${one.variant && " (" + one.variant + ")"} · sample ${one.index}`;
  const verdict = one.error !== null ? "not scored: " + one.error : one.rule >= 1 ? "✓ right" : "✗ wrong";
  const text = element(
    "div",
    { className: "text" },
    element("p", { className: "question", textContent: one.question }),
    element("p", { className: "quiet", textContent: `${where} · ${one.kind} · ${one.origin} · truth: ${one.truth} (${one.verifier})` }),
    element("p", { className: one.error === null && one.rule >= 1 ? "good" : "bad", textContent: verdict }),
    element("p", {}, ...one.marks.map((name) => element("span", { className: "flag", textContent: name }))),
    said(one),
    numbers,
  );
  const picture =
    one.picture === null
      ? element("div", { className: "nopicture", textContent: "no picture" })
      : element("img", { alt: "picture of the question", src: "data:image/png;base64," + pictures[one.picture] });
  return element("article", { className: "scene" }, picture, text);
}

function said(one) {
  const made = element("p", { className: "said" }), characters = Array.from(one.text); // Python's places are code points
  let position = 0;
  for (const [start, end, isTrue] of one.claim_spans) {
    if (start < position || end > characters.length || end <= start) continue;
    made.append(characters.slice(position, start).join(""));
    made.append(element("mark", { className: isTrue ? "true" : "false", textContent: characters.slice(start, end).join("") }));
    position = end;
  }
  made.append(characters.slice(position).join(""));
  return made;
}

form.addEventListener("input", select);
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", show);
select();
