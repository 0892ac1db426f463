"use strict";
const chosen = ["task", "verdict", "kind", "search"].map((id) => document.getElementById(id));
function filter() {
  const [task, verdict, kind, text] = chosen.map((field) => field.value.toLowerCase());
  let count = 0;
  for (const scene of document.querySelectorAll("article")) {
    const fits =
      (!task || scene.dataset.task === task) &&
      (!kind || scene.dataset.kind.toLowerCase().includes(kind)) &&
      (!text || scene.textContent.toLowerCase().includes(text));
    let shown = 0;
    for (const answer of scene.querySelectorAll(".answer")) {
      answer.hidden = !fits || (verdict && answer.dataset.verdict !== verdict);
      shown += answer.hidden ? 0 : 1;
    }
    scene.hidden = shown === 0;
    count += shown;
  }
  document.getElementById("count").textContent = count;
}
for (const field of chosen) field.addEventListener("input", filter);
filter();
