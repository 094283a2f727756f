"use strict";
// Sort a table by a column: numbers by data-v or their text, everything else as text; empty cells last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const direction = head.dataset.dir === "1" ? -1 : 1;
    heads.forEach((other) => delete other.dataset.dir);
    head.dataset.dir = String(direction);
    const value = (row) => {
      const cell = row.cells[column];
      const text = cell.dataset.v ?? cell.textContent.trim();
      return head.classList.contains("n") ? (text === "" || text === "–" ? null : Number.parseFloat(text)) : text;
    };
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [value(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return direction * (typeof a === "number" ? a - b : a.localeCompare(b));
    });
    body.append(...keyed.map(([, row]) => row));
  }));
}
// A filter keeps the rows that hold all its words; it says how many those are.
for (const filter of document.querySelectorAll("input[data-filters]")) {
  const body = document.getElementById(filter.dataset.filters).tBodies[0];
  const rows = [...body.rows].map((row) => [row, row.textContent.toLowerCase()]);
  const count = filter.closest("p").querySelector(".count");
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  };
  filter.addEventListener("input", show);
  show();
}
