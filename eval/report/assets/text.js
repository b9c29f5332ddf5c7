"use strict";
// Text of models and data: it reaches the page as text nodes, or through KaTeX, which trusts nothing. Each has an
// element of its own, so that marks of direction end with it, and shows its start and its end alone if it is long.

const LONG = 3000; // characters of prose that are shown at first
const SHORT = 160; // of a name, a key, a cell
const WITH_MATHS = 5000; // up to so many characters LaTeX is typeset

const byId = (id) => document.getElementById(id);

function el(name, attributes, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) if (value != null) node.setAttribute(key, value);
  node.append(...children.filter((child) => child != null && child !== ""));
  return node;
}

const cut = (text, most) =>
  text.length <= most ? text : `${text.slice(0, Math.ceil(most / 2))} … ${text.slice(-Math.floor(most / 2))}`;

// For what holds no elements: labels, options. Marks of direction and control characters would reach what follows.
const plain = (text, most = 60) =>
  cut(String(text), most).replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]|\p{Cc}/gu, " ");

function folded(box, text, most, fill) {
  fill(cut(text, most));
  if (text.length <= most) return box;
  const label = `all ${text.length.toLocaleString("en")} characters`;
  const button = el("button", { type: "button", class: "fold", "aria-expanded": "false" }, label);
  button.onclick = () => {
    const open = button.getAttribute("aria-expanded") === "false";
    button.setAttribute("aria-expanded", open);
    button.textContent = open ? "less" : label;
    fill(open ? text : cut(text, most));
  };
  return el(box.localName === "bdi" ? "span" : "div", {}, box, " ", button);
}

function brief(text, most = SHORT) {
  const box = el("bdi", { dir: "auto" });
  return folded(box, String(text), most, (part) => (box.textContent = part));
}

function prose(text, name = "span", style = "text") {
  const box = el(name, { class: style, dir: "auto" });
  const fill = (part) => {
    box.replaceChildren(...(part.length <= WITH_MATHS ? withMaths(part) : [part]));
    box.removeAttribute("tabindex");
    if (box.querySelector("math")) box.tabIndex = 0; // which may be wider than the box, and is scrolled by keys then
  };
  return folded(box, text, LONG, fill);
}

// -------------------------------------------------------------------------------------------------------- mathematics

function typeset(tex, display, raw) {
  const node = el("span");
  const options = { output: "mathml", displayMode: display, throwOnError: true, strict: "ignore", trust: false };
  try {
    katex.render(tex, node, { ...options, maxSize: 10, maxExpand: 200 });
    return node;
  } catch {
    return raw;
  }
}

// Where the brace that opens before `start` closes, or -1.
function closing(text, start) {
  for (let i = start, depth = 1; i < text.length; i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === "{") depth++;
    else if (text[i] === "}" && --depth === 0) return i;
  }
  return -1;
}

// "$7 or 8$ more": what begins with a digit and has blanks is a formula by its LaTeX alone.
const MONEY = /^\d[^\\^_]*\s[^\\^_]*$/;
const MATHS = /\$\$([^]+?)\$\$|\$(?!\s)([^$\n]*?[^$\n\s\\])\$(?!\d)|\\\(([^]+?)\\\)|\\\[([^]+?)\\\]|\\boxed\{/g;

function withMaths(text) {
  const nodes = [];
  let at = 0;
  MATHS.lastIndex = 0;
  for (let found; (found = MATHS.exec(text));) {
    let end = MATHS.lastIndex;
    let node;
    if (MONEY.test(found[2] ?? "")) {
      MATHS.lastIndex = found.index + 1; // the second $ may begin a formula
      continue;
    } else if (found[0] === "\\boxed{") {
      const close = closing(text, end);
      if (close < 0) continue;
      const inside = text.slice(end, close);
      node = el("span", { class: "boxed" }, /[\\^_]/.test(inside) ? typeset(inside, false, inside) : inside);
      end = close + 1;
    } else {
      const display = found[1] ?? found[4];
      node = typeset(display ?? found[2] ?? found[3], display != null, found[0]);
    }
    nodes.push(text.slice(at, found.index), node);
    MATHS.lastIndex = at = end;
  }
  return [...nodes, text.slice(at)].filter((node) => node !== "");
}

// -------------------------------------------------------------------------------------------------- numbers and tables

// Halves to the even side, as the terminal has them.
const evenly = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

function number(x, digits = 3) {
  return x == null ? "–" : (evenly(x * 10 ** digits) / 10 ** digits + 0).toFixed(digits);
}
// As short as it can be read: small numbers by their first digits.
const compact = (x) => (x != null && x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : number(x, 4));
const signed = (x) => (x > 0 ? "+" : "") + number(x);
const percent = (x) => number(100 * x, 1);
const total = (of) => Object.values(of).reduce((sum, x) => sum + x, 0);

function duration(s) {
  if (s < 90) return `${Math.round(s)} s`;
  return s < 5400 ? `${Math.round(s / 60)} min` : `${number(s / 3600, 1)} h`;
}

// Rows of cells, each a text or a node; the first one names the row, those that `isNumber` are set as numbers.
function tableOf(head, rows, isNumber = () => true) {
  const style = (i) => (i && isNumber(i) ? "n" : null);
  const inside = (cell) => (cell instanceof Node ? cell : brief(cell ?? ""));
  const line = (row) =>
    row.map((cell, i) => (i ? el("td", { class: style(i) }, inside(cell)) : el("th", { scope: "row" }, inside(cell))));
  const names = head.map((cell, i) => el("th", { class: style(i), scope: "col" }, inside(cell)));
  const body = el("tbody", {}, ...rows.map((row) => el("tr", {}, ...line(row))));
  return scrolled(`table by ${plain(head[0] || "score")}`, el("thead", {}, el("tr", {}, ...names)), body);
}

const scrolled = (label, ...parts) =>
  el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": label }, el("table", {}, ...parts));

// --------------------------------------------------------------------------------------------------------------- parts

// What lies packed in the page, by the id of its element.
const unpacked = new Map();
async function unpack(id) {
  if (!unpacked.has(id)) {
    if (!self.DecompressionStream)
      throw new Error("this browser is too old; Chrome and Edge 109, Firefox 113, Safari 16.4 and later ones show it");
    const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, JSON.parse(await new Response(stream).text()));
    if (unpacked.size > 64) unpacked.delete(unpacked.keys().next().value);
  }
  return unpacked.get(id);
}

// What is said in place of a part that cannot be read.
function unreadable(error) {
  const old = !self.DecompressionStream;
  const fix = old ? "" : "; the file is damaged: make the page again with report.py";
  return el(
    "p",
    { class: "bad", role: "alert" },
    `This part of the page cannot be read: ${plain(error.message, 200)}${fix}.`,
  );
}
