"use strict";
// Starts the page, and follows its address.

async function start() {
  head();
  curves();
  groupControls();
  changedControls();
  const before = history.state;
  const part = location.hash.includes("=") ? lookedAt() : byId(location.hash.slice(1));
  await Promise.all([showGroups(), showChanged()]);
  byId("loading").remove();
  follow();
  if (before?.open) takeUp(before);
  else if (part) part.scrollIntoView();
  document.documentElement.dataset.ready = "yes";
}

// The part of the page that an address with settings is about.
function lookedAt() {
  const has = (...ids) => ids.some((id) => view.has(id));
  if (has("uid")) return byId("cards");
  if (has("step", "flag", "search", "everywhere", "order", "run")) return byId("groups");
  if (has("move", "kind", "find", "changed-run", "against")) return byId("changed");
  return null;
}

addEventListener("pagehide", remember);
addEventListener("hashchange", () => {
  if (!location.hash.includes("=")) return remember(); // a part of the page, to which the browser has gone
  view = addressed();
  showCurves();
  showChanged();
  showGroups().then(() => lookedAt()?.scrollIntoView());
});
start();
