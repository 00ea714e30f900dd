"use strict";
// Draws the metric chosen in #metric for the runs that are switched on. Text is set as text, never as markup.
(() => {
  const element = document.getElementById("data");
  const plot = document.getElementById("plot");
  if (!plot) return;
  const { metrics, runs } = JSON.parse(element.textContent);
  const choice = document.getElementById("metric"), tip = document.getElementById("tip"), legend = document.getElementById("legend");
  const dashes = ["", "7 3", "2 3", "9 3 2 3"];
  const margin = { left: 44, right: 14, top: 10, bottom: 38 };
  let points = [];

  function add(parent, name, attributes, text = "") {
    const made = parent.namespaceURI.endsWith("svg") ? document.createElementNS(parent.namespaceURI, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return parent.appendChild(made);
  }

  function ticks(most, count) {
    const rough = most / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((digit) => digit * power).find((size) => size >= rough);
    return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
  }

  const short = (value) => (value >= 10000 ? `${+(value / 1000).toFixed(1)}k` : `${+value.toFixed(3)}`);

  function draw() {
    const shown = runs.filter((run) => run.on && run.curves[choice.value]?.length);
    const all = shown.flatMap((run) => run.curves[choice.value]);
    const [xMost, yMost] = [0, 1].map((axis) => 1.03 * all.reduce((most, point) => Math.max(most, point[axis]), 0) || 1);
    const width = plot.clientWidth, height = Math.round(Math.min(480, Math.max(260, width / 2)));
    const x = (value) => margin.left + (value / xMost) * (width - margin.left - margin.right);
    const y = (value) => height - margin.bottom - (value / yMost) * (height - margin.top - margin.bottom);
    plot.replaceChildren();
    plot.setAttribute("height", height);
    for (const value of ticks(yMost, 6)) {
      add(plot, "line", { class: "grid-line", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) });
      add(plot, "text", { x: margin.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    for (const value of ticks(xMost, width / 90)) add(plot, "text", { x: x(value), y: height - 20, "text-anchor": "middle" }, short(value));
    add(plot, "text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, "iteration");
    if (!shown.length) add(plot, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no run that is shown has this yet");
    points = [];
    const groups = [...new Set(shown.map((run) => run.group))];
    for (const run of shown) {
      const places = run.curves[choice.value].map(([i, value]) => ({ run, i, value, x: x(i), y: y(value) }));
      const line = add(plot, "path", { d: places.map((p, n) => `${n ? "L" : "M"}${p.x.toFixed(1)} ${p.y.toFixed(1)}`).join(""), stroke: run.colour, "stroke-dasharray": dashes[groups.indexOf(run.group) % dashes.length] });
      const last = places[places.length - 1];
      add(plot, "circle", { cx: last.x, cy: last.y, r: 3.5, fill: run.colour });
      points.push(...places.map((place) => ({ ...place, line })));
    }
    hover();
  }

  function hover(event) {
    plot.querySelectorAll(".near").forEach((line) => line.classList.remove("near"));
    const box = plot.getBoundingClientRect();
    let best = null, least = 40;  // px
    for (const point of event ? points : []) {
      const distance = Math.hypot(point.x - event.clientX + box.left, point.y - event.clientY + box.top);
      if (distance < least) [best, least] = [point, distance];
    }
    tip.hidden = !best;
    if (!best) return;
    best.line.classList.add("near");
    tip.textContent = `${best.run.run}: ${metrics[choice.value]} ${best.value.toFixed(2)} after ${best.i.toLocaleString("en")} iterations`;
    tip.style.top = `${best.y + 12}px`;
    tip.style.left = `${Math.max(0, Math.min(best.x + 12, box.width - tip.offsetWidth))}px`;
  }

  function toggle(some) {
    const on = !some.every((run) => run.on);
    for (const run of some) {
      run.on = on;
      run.button.setAttribute("aria-pressed", on);
    }
    draw();
  }

  const by = (some, key) => some.reduce((found, run) => found.set(run[key], [...(found.get(run[key]) ?? []), run]), new Map());
  [...by(runs, "group")].forEach(([group, members]) => {
    add(legend, "h3", {}, group);
    [...by(members, "family")].forEach(([family, some]) => {
      const row = add(legend, "div", {});
      const head = add(row, "button", { class: "family", type: "button" }, `\u25cf ${family}`);
      head.style.color = some[0].colour;
      head.addEventListener("click", () => toggle(some));
      for (const run of some) {
        run.button = add(row, "button", { type: "button", title: run.run, "aria-pressed": run.on }, run.label);
        run.button.addEventListener("click", () => toggle([run]));
      }
    });
  });
  for (const option of [...choice.options]) if (!runs.some((run) => run.curves[option.value])) option.remove();
  choice.addEventListener("change", draw);
  plot.addEventListener("pointermove", hover);
  plot.addEventListener("pointerleave", () => hover());
  addEventListener("resize", draw);
  draw();
})();
