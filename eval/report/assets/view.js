"use strict";
// What is looked at: it stands in the address, so that a link leads to the same view and a page that loads itself again
// keeps it. What a link has no use for, such as the place on the page, is kept in the browser's history.

const about = JSON.parse(byId("about").textContent);
const runs = about.runs;

let view = addressed();
const seen = (id, usual = "") => view.get(id) ?? usual;

function addressed() {
  const said = location.hash.slice(1);
  return new URLSearchParams(said.includes("=") ? said : "");
}

// Say what a control is set to; nothing where that is the usual.
function say(id, value, usual = "") {
  if (`${value}` === `${usual}`) view.delete(id);
  else view.set(id, value);
  clearTimeout(say.waiting);
  say.waiting = setTimeout(remember, 150); // browsers limit how often an address changes
}

function remember() {
  clearTimeout(say.waiting);
  const said = `${view}`;
  history.replaceState(kept(), "", said ? `#${said}` : location.href.split("#")[0]);
}

const runOf = (id) =>
  Math.max(
    0,
    runs.findIndex((run) => run.name === seen(id)),
  );

// Give a <select> its options, [[value, label], …], and choose what is looked at, or else the usual one.
function choose(id, options, usual = options[0]?.[0] ?? "") {
  const select = byId(id);
  const value = options.some(([name]) => `${name}` === seen(id)) ? seen(id) : `${usual}`;
  select.replaceChildren(...options.map(([name, label]) => el("option", { value: name, dir: "auto" }, plain(label))));
  select.value = value;
  return value;
}

function put(id, value) {
  if (byId(id).value !== `${value}`) byId(id).value = value; // else a cursor would jump
}

// ------------------------------------------------------------------------------------------- loading the page again

const FOLDS = "details, .fold";
const isOpen = (node) => (node.localName === "details" ? node.open : node.getAttribute("aria-expanded") === "true");

// Every card has a name, which stays over loading.
const cardOf = (node) => node.closest("[data-card]");
const cards = () => [...document.querySelectorAll("[data-card]")];

function kept() {
  if (!document.documentElement.dataset.ready) return history.state;
  const open = cards().flatMap((card) =>
    [...card.querySelectorAll(FOLDS)].flatMap((node, i) => (isOpen(node) ? [[card.dataset.card, i]] : [])),
  );
  const shown = { cards: byId("cards").childElementCount, answers: byId("answers").childElementCount };
  const at = document.elementFromPoint(innerWidth / 2, 4)?.closest("[data-card], section, header");
  const anchor = at && { card: at.dataset.card, section: at.id, top: at.getBoundingClientRect().top };
  return { open, shown, anchor, focus: document.activeElement?.id };
}

// Open and scroll to what was open and looked at before.
function takeUp(before) {
  for (const [name, i] of before.open) {
    const node = cards()
      .find((card) => card.dataset.card === name)
      ?.querySelectorAll(FOLDS)[i];
    if (node && !isOpen(node)) node.localName === "details" ? (node.open = true) : node.click();
  }
  byId(before.focus)?.focus({ preventScroll: true });
  const { card, section, top } = before.anchor || {};
  const place = () => cards().find((node) => card && node.dataset.card === card) || byId(section);
  const scroll = () => place() && scrollBy(0, place().getBoundingClientRect().top - top);
  scroll();
  requestAnimationFrame(() => (scroll(), requestAnimationFrame(scroll))); // heights are known once they are drawn
}

// A page on a run that goes on loads itself again.
function follow() {
  if (!about.refresh) return;
  const box = el("input", { type: "checkbox", id: "follow" });
  box.checked = seen("follow", "yes") === "yes";
  box.onchange = () => (say("follow", box.checked ? "yes" : "no", "yes"), later());
  let waiting;
  const later = () => {
    clearTimeout(waiting);
    if (box.checked) waiting = setTimeout(() => (remember(), location.reload()), 1000 * about.refresh);
  };
  const label = el("label", {}, box, ` the page loads itself again every ${about.refresh} s`);
  byId("notice").replaceChildren(`As of ${about.as_of}; the run goes on. `, label);
  later();
}
