"use strict";
// A click on a column title sorts the table by that column: as numbers if all are numbers, else as text.
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => title.addEventListener("click", () => {
    const ascending = title.getAttribute("aria-sort") !== "ascending";
    titles.forEach((other) => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.by;
    const numbers = [...table.tBodies[0].rows].every((row) => key(row) !== "" && !isNaN(key(row)));
    const order = (a, b) => (numbers ? key(a) - key(b) : key(a).localeCompare(key(b)));
    const rows = [...table.tBodies[0].rows].sort((a, b) => (ascending ? order(a, b) : order(b, a)));
    table.tBodies[0].append(...rows);
  }));
}

// The HLO is unpacked here and split into computations; each is rendered only when it is expanded.
const section = document.getElementById("hlo");
const program = document.getElementById("program");
const search = section.querySelector("input[type=search]");
const metadata = section.querySelector("input[type=checkbox]");
const found = document.getElementById("found");
let blocks = [];

const bare = (line) => line
  .replace(/, metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}/, "")
  .replace(/, backend_config=(\{.*\}|"(?:[^"\\]|\\.)*")/, "")
  .replace(/, frontend_attributes=\{[^{}]*\}/, "");

function render(block) {
  if (!block.details.open) return;
  const term = search.value.toLowerCase();
  const pre = block.details.querySelector("pre");
  pre.replaceChildren();
  for (const line of block.lines) {
    const text = metadata.checked ? line : bare(line);
    if (term && !text.toLowerCase().includes(term)) continue; // a search shows matching lines only
    let start = 0;
    for (let at; term && (at = text.toLowerCase().indexOf(term, start)) >= 0; start = at + term.length) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(at, at + term.length);
      pre.append(text.slice(start, at), mark);
    }
    pre.append(text.slice(start) + "\n");
  }
}

function update() {
  const term = search.value.toLowerCase();
  let lines = 0;
  for (const block of blocks) {
    const hits = term ? block.lines.filter((line) => (metadata.checked ? line : bare(line)).toLowerCase().includes(term)) : [];
    lines += hits.length;
    block.details.hidden = term !== "" && hits.length === 0;
    block.details.open = term ? hits.length > 0 && lines <= 400 : block.entry;
    render(block);
  }
  found.textContent = term ? `${lines} line${lines === 1 ? "" : "s"}` : `${blocks.length} sections`;
}

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("packed").textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const text = await new Response(stream).text();
  let lines = [];
  const pieces = [lines];
  for (const line of text.split("\n")) {
    if (/^(ENTRY |%?[\w.\-]+ ).*\{$/.test(line)) pieces.push((lines = []));
    if (line) lines.push(line);
  }
  const isEntry = (piece) => piece[0].startsWith("ENTRY");
  const filled = pieces.filter((piece) => piece.length);
  blocks = [...filled.filter(isEntry), ...filled.filter((piece) => !isEntry(piece))].map((piece) => {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const title = bare(piece[0]).replace(/\s*\{$/, "");
    summary.textContent = `${title.length > 160 ? title.slice(0, 160) + "…" : title}  (${piece.length} lines)`;
    details.append(summary, document.createElement("pre"));
    const block = { details, lines: piece, entry: isEntry(piece) };
    details.addEventListener("toggle", () => render(block));
    return block;
  });
  program.replaceChildren(...blocks.map((block) => block.details));
  update();
}

let pending;
search.addEventListener("input", () => { clearTimeout(pending); pending = setTimeout(update, 150); });
metadata.addEventListener("change", update);
for (const button of section.querySelectorAll("[data-do]"))
  button.addEventListener("click", () => blocks.forEach((block) => { block.details.open = button.dataset.do === "open"; }));
unpack();
