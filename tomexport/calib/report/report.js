// One box says what the mark under the pointer, or the one that has the focus, stands for.
"use strict";
const box = document.getElementById("tip");
let shown = null;

function place() {
  const gap = 8, at = shown.getBoundingClientRect(), own = box.getBoundingClientRect();
  const right = document.documentElement.clientWidth - own.width - gap;
  const above = at.top - own.height - gap;
  box.style.left = `${Math.max(gap, Math.min(at.left + (at.width - own.width) / 2, right))}px`;
  box.style.top = `${above < gap ? at.bottom + gap : above}px`;
}

function show(mark) {
  shown = mark;
  box.hidden = !mark;
  if (!mark) return;
  box.textContent = mark.dataset.tip;
  box.style.left = box.style.top = "0";
  place();
}

for (const kind of ["mouseover", "focusin"]) {
  document.addEventListener(kind, (event) => show(event.target.closest("[data-tip]")));
}
document.addEventListener("focusout", () => show(null));
document.addEventListener("scroll", () => shown && place(), { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") show(null);
});
