"use strict";
// Draws the chosen metric of the chosen group's lines. Text is set as text, never as markup.
(() => {
  const plot = document.getElementById("plot");
  if (!plot) return;
  const { metrics, groups } = JSON.parse(document.getElementById("data").textContent);
  const [metric, group, tip, legend] = ["metric", "group", "tip", "legend"].map((id) => document.getElementById(id));
  const margin = { left: 50, right: 14, top: 10, bottom: 38 };
  const hidden = new Set();
  let points = [];

  function add(parent, name, attributes, text = "") {
    const made = document.createElementNS(parent.namespaceURI, name);
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
    const shown = groups[group.value].filter((line) => !hidden.has(line.family) && line.curves[metric.value]?.length);
    const all = shown.flatMap((line) => line.curves[metric.value]);
    const most = (values) => 1.03 * values.reduce((one, other) => Math.max(one, other), 0) || 1;
    const xMost = most(all.map(([at]) => at)), yMost = most(all.flatMap((point) => point.slice(1)));
    const width = plot.clientWidth, height = Math.round(Math.min(480, Math.max(260, width / 2)));
    const x = (value) => margin.left + (value / xMost) * (width - margin.left - margin.right);
    const y = (value) => height - margin.bottom - (value / yMost) * (height - margin.top - margin.bottom);
    const path = (some) => some.map(([at, value], n) => `${n ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    plot.replaceChildren();
    plot.setAttribute("height", height);
    for (const value of ticks(yMost, 6)) {
      add(plot, "line", { class: "grid-line", x1: margin.left, x2: width - margin.right, y1: y(value), y2: y(value) });
      add(plot, "text", { x: margin.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
    }
    for (const value of ticks(xMost, width / 90)) add(plot, "text", { x: x(value), y: height - 20, "text-anchor": "middle" }, short(value));
    add(plot, "text", { x: width - margin.right, y: height - 4, "text-anchor": "end" }, "iteration");
    add(plot, "text", { transform: `translate(12 ${(height - margin.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, metrics[metric.value]);
    if (!shown.length) add(plot, "text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show");
    points = [];
    for (const line of shown) {
      const curve = line.curves[metric.value], band = curve.filter((point) => point.length > 2);
      if (band.length) add(plot, "path", { class: "band", fill: line.colour, d: `${path(band.map(([at, , low]) => [at, low]))}${path(band.map(([at, , , high]) => [at, high]).reverse()).replace("M", "L")}Z` });
      const drawn = add(plot, "path", { d: path(curve), stroke: line.colour });
      const [at, value] = curve[curve.length - 1];
      add(plot, "circle", { cx: x(at), cy: y(value), r: 3.5, fill: line.colour });
      points.push(...curve.map(([at, value]) => ({ line, drawn, at, value, x: x(at), y: y(value) })));
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
    best.drawn.classList.add("near");
    tip.textContent = `${best.line.run}: ${metrics[metric.value]} ${best.value.toFixed(2)} after ${best.at.toLocaleString("en")} iterations`;
    tip.style.top = `${best.y + 12}px`;
    tip.style.left = `${Math.max(0, Math.min(best.x + 12, box.width - tip.offsetWidth))}px`;
  }

  function choose() {
    const lines = groups[group.value], before = metric.value;
    metric.replaceChildren();
    for (const [key, name] of Object.entries(metrics)) if (lines.some((line) => line.curves[key])) add(metric, "option", { value: key }, name);
    if ([...metric.options].some((option) => option.value === before)) metric.value = before;
    hidden.clear();
    legend.replaceChildren();
    for (const [family, colour] of new Map(lines.map((line) => [line.family, line.colour]))) {
      const button = add(legend, "button", { type: "button", "aria-pressed": true }, family);
      button.style.setProperty("--colour", colour);
      button.addEventListener("click", () => {
        if (!hidden.delete(family)) hidden.add(family);
        button.setAttribute("aria-pressed", !hidden.has(family));
        draw();
      });
    }
    draw();
  }

  for (const name of Object.keys(groups)) add(group, "option", {}, name);
  const first = Object.keys(groups).find((name) => groups[name].some((line) => line.curves["bbox/AP"]));
  if (first) group.value = first;
  metric.addEventListener("change", draw);
  group.addEventListener("change", choose);
  plot.addEventListener("pointermove", hover);
  plot.addEventListener("pointerleave", () => hover());
  addEventListener("resize", draw);
  choose();
})();
