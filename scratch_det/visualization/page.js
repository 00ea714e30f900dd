"use strict";
// A click on a header sorts the rows: up, down, as they were. What begins with a number comes before what does not.
(() => {
  function value(cell) {
    const [, number, unit] = /^[(+]*(-?[\d,]*\.?\d+)(?: ([kMGT])\b)?/.exec(cell.textContent) ?? [];
    return number && Number(number.replaceAll(",", "")) * 1000 ** ("kMGT".indexOf(unit ?? "-") + 1);
  }

  function compare(one, other, sign) {
    const [a, b] = [value(one), value(other)];
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined) || sign * one.textContent.localeCompare(other.textContent, "en", { numeric: true });
    return sign * (a - b);
  }

  const next = { none: "ascending", ascending: "descending", descending: "none" };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0], rows = [...body.rows];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      if (!button.textContent) button.ariaLabel = "row";
      head.append(button);
      head.ariaSort = "none";
      button.addEventListener("click", () => {
        const order = next[head.ariaSort], sign = order === "descending" ? -1 : 1;
        for (const other of heads) other.ariaSort = other === head ? order : "none";
        body.append(...(order === "none" ? rows : [...rows].sort((one, other) => compare(one.cells[column], other.cells[column], sign))));
      });
    });
  }
})();
