"use strict";
// The groups of a step as cards: found by what is noteworthy, ordered, searched, linked to.

const AT_ONCE = 20; // cards
const OPTIONS = 26; // of a question that are shown
const FLAGS = {
  "": "all groups",
  wrong: "majority wrong",
  split: "split: half or less agree",
  skipped: "skipped",
  abstained: "with abstentions",
  cut: "with responses cut off",
  judge: "judge against majority",
};
const tokens = (group) => total(group.responses.map((r) => r.tokens));
const ORDERS = {
  "as they were asked": null,
  "least agreed first": (a, b) => a.share - b.share,
  "most agreed first": (a, b) => b.share - a.share,
  "longest first": (a, b) => tokens(b) - tokens(a),
};

// --------------------------------------------------------------------------------------------------------------- cards

const mark = (right) =>
  right == null ? null : el("span", { class: right ? "good" : "bad" }, right ? "✓ right" : "✗ wrong");
const answer = (key) => (key == null ? el("i", {}, "no answer") : brief(key));
const tag = (said, style) => el("span", { class: `tag ${style}` }, said);

function pictureOf(source, question) {
  if (source == null) return null;
  const node = el("img", { src: source, alt: `picture of the question: ${plain(question, 200)}`, loading: "lazy" });
  node.onload = () => node.naturalWidth <= 160 && node.classList.add("small");
  node.onerror = () => node.replaceWith(el("p", { class: "quiet" }, "the picture is not there: ", brief(source)));
  return node;
}

function asked(item) {
  const options = (item.choices || []).slice(0, OPTIONS).map((choice) => el("li", {}, prose(choice)));
  const more = (item.choices || []).length - options.length;
  return [
    prose(item.question, "p", "question"),
    options.length ? el("ol", { class: "options", type: "A" }, ...options) : null,
    more > 0 ? el("p", { class: "facts" }, `and ${more} more options`) : null,
    item.gold == null ? null : el("p", { class: "facts" }, el("span", {}, "gold ", brief(item.gold))),
  ];
}

// The colour of each key of a group by its rank among the votes; all after the last colour share one.
function coloursOf(responses) {
  const count = new Map();
  for (const { key } of responses) if (key != null) count.set(key, (count.get(key) || 0) + 1);
  const ordered = [...count].sort((a, b) => b[1] - a[1]).map(([key]) => key);
  return new Map(ordered.map((key, i) => [key, i < COLOURS ? `var(--c${i})` : "var(--quiet)"]));
}

function response(r, colours) {
  const judge = r.judge && `judge ${r.judge.score == null ? "not read" : number(r.judge.score, 2)}`;
  const written = (r.judge?.judgements || []).map((text) => prose(text));
  const said = [
    el("span", {}, "answer ", answer(r.key)),
    mark(r.right),
    r.reward == null ? null : el("span", {}, `reward ${number(r.reward)}`),
    r.advantage == null ? null : el("span", {}, `advantage ${signed(r.advantage)}`),
    judge ? el("span", {}, judge) : null,
    el("span", {}, `${r.tokens} tokens`),
    r.cut ? el("span", { class: "warn" }, "cut off") : null,
    r.view ? el("span", {}, "sees it ", brief(r.view)) : null,
  ];
  const words = written.length ? el("details", {}, el("summary", {}, "what the judge wrote"), ...written) : null;
  const node = el("li", {}, prose(r.text), el("div", { class: "facts" }, ...said), words);
  if (r.key != null) node.style.setProperty("--key", colours.get(r.key));
  return node;
}

// What a link calls a group: an address can hold neither every character nor every length.
const handle = (uid) => new URLSearchParams({ uid: uid.slice(0, 200) }).get("uid");

function groupCard(run, step, group) {
  const place = { run: runs[run].name, step: step + 1, uid: handle(group.uid) };
  const link = el(
    "a",
    { href: `#${new URLSearchParams(place)}`, title: "a link to this group" },
    `step ${step + 1}, link`,
  );
  link.setAttribute("aria-label", `link to group ${plain(group.uid)} of step ${step + 1}`);
  link.onclick = (event) => (event.preventDefault(), goTo(place));
  const colours = coloursOf(group.responses);
  const picture = pictureOf(group.image, group.question);
  const vote = group.majority == null ? ["no majority"] : ["majority ", brief(group.majority)];
  const tags = group.flags.map((flag) => tag(FLAGS[flag].split(":")[0], flag === "wrong" ? "bad" : "warn"));
  return el(
    "article",
    { class: picture ? "card" : "card plain", "data-card": `group ${run} ${step} ${handle(group.uid)}` },
    el("h3", {}, brief(group.uid), " ", ...tags, " ", link),
    picture,
    el(
      "div",
      {},
      ...asked(group),
      el("p", { class: "facts" }, el("span", {}, ...vote, ` with ${percent(group.share)} %`)),
    ),
    el("div", { class: "foot" }, el("ol", { class: "responses" }, ...group.responses.map((r) => response(r, colours)))),
  );
}

// Cards for some items, so many at once; those that were there before the page was loaded again, at once, too.
function paged(box, button, items, make) {
  const before = document.documentElement.dataset.ready ? 0 : history.state?.shown?.[box.id] || 0;
  let shown = 0;
  const more = (count) => {
    box.append(...items.slice(shown, shown + count).map(make));
    shown = Math.min(shown + count, items.length);
    button.hidden = shown === items.length;
    button.textContent = `Show more: ${items.length - shown} left`;
  };
  box.replaceChildren();
  button.onclick = () => more(AT_ONCE);
  more(Math.max(AT_ONCE, before));
}

// ------------------------------------------------------------------------------------------------------------- finding

function textsOf(group) {
  const responses = group.responses.flatMap((r) => [r.text, r.key ?? "", ...(r.judge?.judgements || [])]);
  return [group.uid, group.question, group.gold ?? "", ...(group.choices || []), ...responses];
}

const holds = (texts, words) => !words || texts.some((text) => text.toLowerCase().includes(words));

// The part at which the slider stands, by the step that is looked at: the last one, if none is named; -1 if there is
// none of that name.
function partOf(run) {
  const step = seen("step");
  return step === "" ? run.parts.length - 1 : run.parts.indexOf(Number(step) - 1);
}

let asking = 0; // the latest search; an earlier one that is still going on ends
async function showGroups() {
  const mine = ++asking;
  const found = byId("found");
  choose(
    "run",
    runs.map((run) => [run.name, run.name]),
  );
  const run = runOf("run");
  const { parts, config, note } = runs[run];
  const at = partOf(runs[run]);
  byId("step").max = Math.max(parts.length - 1, 0);
  put("step", Math.max(at, 0));
  byId("stepped").value = at < 0 ? "" : `${parts[at] + 1} of ${config.steps}`;
  put("search", seen("search"));
  byId("everywhere").checked = seen("everywhere") === "yes";
  choose(
    "order",
    Object.keys(ORDERS).map((name) => [name, name]),
  );
  byId("note").replaceChildren(...(note ? [brief(note, 400)] : []));
  found.className = "";
  const words = seen("search").trim().toLowerCase();
  const steps = byId("everywhere").checked ? parts : parts.slice(Math.max(at, 0), Math.max(at, 0) + 1);
  const matching = [];
  let all = 0;
  try {
    for (const step of steps) {
      const groups = await unpack(`groups-${run}-${step}`);
      if (mine !== asking) return;
      all += groups.length;
      for (const group of groups) if (holds(textsOf(group), words)) matching.push([step, group]);
      if (steps.length > 1) found.textContent = `looking: step ${step + 1}, ${matching.length} found`;
    }
  } catch (error) {
    if (mine !== asking) return;
    byId("cards").replaceChildren(unreadable(error));
    found.textContent = "";
    byId("more").hidden = true;
    return;
  }
  const count = (flag) => matching.filter(([, group]) => !flag || group.flags.includes(flag)).length;
  const flag = choose(
    "flag",
    Object.entries(FLAGS).map(([name, label]) => [name, `${label} (${count(name)})`]),
  );
  let shown = matching.filter(([, group]) => !flag || group.flags.includes(flag));
  const order = ORDERS[byId("order").value];
  if (order) shown.sort(([, a], [, b]) => order(a, b));
  found.textContent = parts.length ? `${shown.length} of ${all} groups` : note ? "" : "No groups yet.";
  const wanted = seen("uid");
  const isWanted = ([, group]) => handle(group.uid) === wanted;
  if (runs.every((one) => one.name !== seen("run", runs[0].name))) {
    found.textContent = `This link is to the run ${plain(seen("run"))}, which is not here; choose another.`;
    shown = [];
  } else if (at < 0 && parts.length) {
    found.textContent = `This link is to step ${plain(seen("step"))}, which is not here; choose one with the slider.`;
    shown = [];
  } else if (wanted && !shown.some(isWanted)) {
    found.textContent = `This link is to the group ${plain(wanted)}, which is not in this step; choose what to show.`;
    shown = [];
  } else if (wanted) shown = [...shown.filter(isWanted), ...shown.filter((one) => !isWanted(one))];
  paged(byId("cards"), byId("more"), shown, ([step, group]) => groupCard(run, step, group));
}

// Look at a group, or at a step.
function goTo(place) {
  for (const id of ["uid", "search", "flag", "everywhere"]) say(id, "");
  for (const [id, value] of Object.entries(place)) say(id, value);
  return showGroups().then(() => byId(place.uid ? "cards" : "groups").scrollIntoView());
}

function groupControls() {
  // Any choice leaves what a link named and is not here.
  const chosen = (id, value, usual) => {
    say("uid", "");
    say("run", byId("run").value, runs[0].name);
    if (partOf(runs[runOf("run")]) < 0) say("step", "");
    say(id, value, usual);
  };
  const newly = (...choice) => (chosen(...choice), showGroups());
  byId("run").parentElement.hidden = runs.length === 1;
  byId("run").onchange = () => newly("step", "");
  byId("flag").onchange = (event) => newly("flag", event.target.value);
  byId("order").onchange = (event) => newly("order", event.target.value, Object.keys(ORDERS)[0]);
  byId("everywhere").onchange = (event) => newly("everywhere", event.target.checked ? "yes" : "");
  byId("step").oninput = (event) => {
    const { parts } = runs[runOf("run")];
    const at = Number(event.target.value);
    newly("step", parts.length ? parts[at] + 1 : "", (parts.at(-1) ?? 0) + 1); // the last one is followed
  };
  let waiting;
  byId("search").oninput = (event) => {
    clearTimeout(waiting);
    chosen("search", event.target.value);
    waiting = setTimeout(showGroups, 200);
  };
}
