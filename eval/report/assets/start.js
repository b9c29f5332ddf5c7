"use strict";
// Starts the page, and follows its address.

async function start() {
  head();
  curves();
  groupControls();
  changedControls();
  const before = history.state;
  const part = location.hash.includes("=") ? seen("uid") && byId("cards") : byId(location.hash.slice(1));
  await Promise.all([showGroups(), showChanged()]);
  byId("loading").remove();
  follow();
  if (before?.open) takeUp(before);
  else if (part) part.scrollIntoView();
  document.documentElement.dataset.ready = "yes";
}

addEventListener("pagehide", remember);
addEventListener("hashchange", () => {
  if (!location.hash.includes("=")) return remember(); // a part of the page, to which the browser has gone
  view = addressed();
  showCurves();
  showChanged();
  showGroups().then(() => seen("uid") && byId("cards").scrollIntoView());
});
start();
