"use strict";
// Tables sort by the column whose title is pressed: numbers as numbers, all else as text.
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => title.addEventListener("click", () => {
    const up = title.getAttribute("aria-sort") !== "ascending";
    titles.forEach((other) => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.by;
    const numbers = [...table.tBodies[0].rows].every((row) => key(row) !== "" && !isNaN(key(row)));
    const order = (a, b) => (numbers ? key(a) - key(b) : key(a).localeCompare(key(b)));
    const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? order(a, b) : order(b, a)));
    table.tBodies[0].append(...rows);
  }));
}

// The HLO is unpacked here, cut into computations, and each is written only when it is unfolded.
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

function write(block) {
  if (!block.details.open) return;
  const term = search.value.toLowerCase();
  const pre = block.details.querySelector("pre");
  pre.replaceChildren();
  for (const line of block.lines) {
    const text = metadata.checked ? line : bare(line);
    if (term && !text.toLowerCase().includes(term)) continue; // what is searched for is all that is shown
    let start = 0;
    for (let at; term && (at = text.toLowerCase().indexOf(term, start)) >= 0; start = at + term.length) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(at, at + term.length);
      pre.append(text.slice(start, at), mark);
    }
    pre.append(text.slice(start) + "\n");
  }
}

function look() {
  const term = search.value.toLowerCase();
  let lines = 0;
  for (const block of blocks) {
    const hits = term ? block.lines.filter((line) => (metadata.checked ? line : bare(line)).toLowerCase().includes(term)) : [];
    lines += hits.length;
    block.details.hidden = term !== "" && hits.length === 0;
    block.details.open = term ? hits.length > 0 && lines <= 400 : block.entry;
    write(block);
  }
  found.textContent = term ? `${lines} line${lines === 1 ? "" : "s"}` : `${blocks.length} parts`;
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
  const written = pieces.filter((piece) => piece.length);
  blocks = [...written.filter(isEntry), ...written.filter((piece) => !isEntry(piece))].map((piece) => {
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    const title = bare(piece[0]).replace(/\s*\{$/, "");
    summary.textContent = `${title.length > 160 ? title.slice(0, 160) + "…" : title}  (${piece.length} lines)`;
    details.append(summary, document.createElement("pre"));
    const block = { details, lines: piece, entry: isEntry(piece) };
    details.addEventListener("toggle", () => write(block));
    return block;
  });
  program.replaceChildren(...blocks.map((block) => block.details));
  look();
}

let waiting;
search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(look, 150); });
metadata.addEventListener("change", look);
for (const button of section.querySelectorAll("[data-do]"))
  button.addEventListener("click", () => blocks.forEach((block) => { block.details.open = button.dataset.do === "open"; }));
unpack();
