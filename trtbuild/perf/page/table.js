"use strict";
// The table of every point: sorted by a click on a column, filtered by words and by conditions such as ttft_p99_ms<500.

const OPERATORS = {
  "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "<": (a, b) => a < b, ">": (a, b) => a > b, "=": (a, b) => a === b,
};
const sorting = { key: null, down: false };

function visibleColumns() {
  const all = byId("all-columns").checked;
  return DATA.columns.filter((column) => all || column.main);
}

function passes(row, word) {
  const match = /^(\w+)(<=|>=|<|>|=)(.+)$/.exec(word);
  if (!match || !DATA.columns.some((column) => column.key === match[1])) {
    return DATA.columns.some((column) => String(row[column.key] ?? "").toLowerCase().includes(word.toLowerCase()));
  }
  const [, key, operator, text] = match, number = Number(text);
  if (!is(row[key])) return false;
  if (typeof row[key] === "number" && !Number.isNaN(number)) return OPERATORS[operator](row[key], number);
  return OPERATORS[operator](String(row[key]).toLowerCase(), text.toLowerCase());
}

function sorted(found) {
  if (sorting.key === null) return found;
  // Cells without a figure stand last, whichever way.
  return [...found].sort((a, b) => {
    const [x, y] = [a[sorting.key], b[sorting.key]];
    if (!is(x) || !is(y)) return is(x) ? -1 : is(y) ? 1 : 0;
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
    return sorting.down ? -order : order;
  });
}

function heading(column) {
  const cell = element("th", null, { class: column.number ? "number" : "", title: column.key });
  if (sorting.key === column.key) cell.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
  cell.append(element("button", column.label, { type: "button" }));
  cell.addEventListener("click", () => {
    sorting.down = sorting.key === column.key ? !sorting.down : false;
    sorting.key = column.key;
    drawTable();
  });
  return cell;
}

function drawTable() {
  const words = byId("filter").value.split(/\s+/).filter(Boolean);
  const columns = visibleColumns(), found = sorted(rows.filter((row) => words.every((word) => passes(row, word))));
  const head = element("tr");
  head.append(...columns.map(heading));
  byId("points").tHead.replaceChildren(head);
  byId("points").tBodies[0].replaceChildren(...found.map((row) => {
    const line = element("tr", null, row.valid ? {} : { class: "invalid", title: row.why_invalid ?? "invalid" });
    for (const column of columns) {
      const value = column.key === "valid" ? (row.valid ? "yes" : "no") : short(row[column.key]);
      line.append(element("td", value ?? "", column.number ? { class: "number" } : {}));
    }
    return line;
  }));
  byId("count").textContent = `${found.length} of ${rows.length} points`;
}

byId("filter").addEventListener("input", drawTable);
byId("all-columns").addEventListener("input", drawTable);
