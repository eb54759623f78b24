"use strict";
(() => {
  const curves = [...document.querySelectorAll(".curve")];
  const chips = [...document.querySelectorAll("button.chip")];
  const tip = document.querySelector(".tip");
  const input = document.querySelector(".legend input");
  const pinned = new Set();

  const draw = (hovered) => {
    const text = input ? input.value.trim().toLowerCase() : "";
    const on = hovered === undefined ? pinned : new Set([hovered]);
    document.body.classList.toggle("picked", on.size > 0);
    for (const curve of curves) {
      const name = curve.dataset.name;
      curve.classList.toggle("hidden", text !== "" && name !== "" && !name.toLowerCase().includes(text));
      curve.classList.toggle("on", on.has(name));
    }
    for (const chip of chips) {
      chip.classList.toggle("off", text !== "" && !chip.dataset.name.toLowerCase().includes(text));
      chip.setAttribute("aria-pressed", String(pinned.has(chip.dataset.name)));
    }
  };

  for (const chip of chips) {
    const name = chip.dataset.name;
    chip.addEventListener("click", () => { if (!pinned.delete(name)) pinned.add(name); draw(); });
    chip.addEventListener("pointerenter", () => draw(name));
    chip.addEventListener("pointerleave", () => draw());
  }
  if (input) input.addEventListener("input", () => draw());

  const points = (path) => [...path.getAttribute("d").matchAll(/[ML]([-\d.]+) ([-\d.]+)/g)].map((m) => [+m[1], +m[2]]);
  const shown = (value) => {
    const size = Math.abs(value);
    return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(3));
  };

  for (const svg of document.querySelectorAll(".chart")) {
    const axes = JSON.parse(svg.dataset.axes);
    const cursor = svg.querySelector(".cursor");
    let lines = null;
    const back = ([low, high, start, end], at, log) => {
      const part = (at - start) / (end - start);
      return log ? low * Math.pow(high / low, part) : low + (high - low) * part;
    };
    const leave = () => { tip.hidden = true; cursor.style.visibility = "hidden"; draw(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      lines = lines || [...svg.querySelectorAll(".line, .dot")].map((path) => [path.parentNode, points(path)]);
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null, least = 40 * 40;
      for (const [curve, list] of lines) {
        if (curve.classList.contains("hidden")) continue;
        for (const [x, y] of list) {
          const far = (x - at.x) ** 2 + (y - at.y) ** 2;
          if (far < least) { least = far; best = [curve, x, y]; }
        }
      }
      if (!best) { leave(); return; }
      const [curve, x, y] = best;
      const step = back(axes.x, x, false);
      const near = axes.steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
      tip.textContent = `${curve.dataset.name || "whole model"}\nstep ${near}: ${shown(back(axes.y, y, axes.log))}`;
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
      tip.style.top = `${Math.max(8, event.clientY - box.height - 12)}px`;
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.visibility = "visible";
      draw(curve.dataset.name);
    });
  }
})();
