"use strict";
// Held-out questions by what became of their greedy answers: before training and after it, or after one run and the
// other.

const MOVES = {
  gained: "gained: made right",
  lost: "lost: made wrong",
  missed: "missed: wrong both times",
  kept: "kept: right both times",
  another: "another answer",
  same: "the same answer",
};

const named = (move) => MOVES[move].split(":")[0];

function moveOf([a], [b]) {
  if (a.correct == null || b.correct == null) return a.key === b.key ? "same" : "another";
  return Object.keys(about.moves).find(
    (name) => about.moves[name][0] === a.correct && about.moves[name][1] === b.correct,
  );
}

const samplesRight = (responses) => responses.slice(1).filter((r) => r.correct).length;
const rise = ({ left, right }) =>
  samplesRight(right) / (right.length - 1 || 1) - samplesRight(left) / (left.length - 1 || 1);

function votes(samples) {
  const found = new Map();
  for (const { key, correct } of samples) found.set(key, { correct, count: (found.get(key)?.count || 0) + 1 });
  return [...found]
    .sort(([, a], [, b]) => b.count - a.count)
    .flatMap(([key, { correct, count }], i) => {
      const verdict = correct ? "\u00a0✓" : "\u00a0✗";
      const sign = correct == null ? "" : el("span", { class: correct ? "good" : "bad" }, verdict);
      return [i ? ", " : "", `${count} × `, answer(key), sign];
    });
}

function side(title, responses) {
  const [greedy, ...samples] = responses;
  const all = samples.map((r) => el("div", { class: "sample" }, prose(r.text), mark(r.correct)));
  return el(
    "div",
    {},
    el("h4", {}, title, " ", mark(greedy.correct)),
    prose(greedy.text),
    samples.length
      ? el("p", { class: "facts" }, el("span", {}, `${samples.length} samples: `, ...votes(samples)))
      : null,
    samples.length ? el("details", {}, el("summary", {}, "all samples"), ...all) : null,
  );
}

// Where the card itself is, and the training groups that ask in the same words.
function linksOf({ row, move }, run) {
  const to = (place) => `#${new URLSearchParams(place)}`;
  const mine = run ? { "changed-run": runs[run].name } : {};
  const asked = { ...(run ? { run: runs[run].name } : {}), everywhere: "yes", search: row.question.slice(0, 300) };
  return [
    el("a", { href: to({ ...mine, move, find: row.uid }) }, "link"),
    " ",
    el("a", { href: to(asked) }, "asked in training"),
  ];
}

function changedCard(pair, titles, run) {
  const { row, left, right, move } = pair;
  const picture = pictureOf(row.image, row.question);
  const counted = (responses) => `${samplesRight(responses)} of ${responses.length - 1}`;
  const samples = row.gold != null && left.length > 1 && `right samples: ${counted(left)} → ${counted(right)}`;
  const kind = row.kind == null ? null : tag(brief(row.kind, 60), "quiet");
  return el(
    "article",
    { class: picture ? "card" : "card plain", "data-card": `changed ${handle(row.uid)}` },
    el("h3", {}, brief(row.uid), " ", tag(named(move), "quiet"), kind, " ", ...linksOf(pair, run)),
    picture,
    el(
      "div",
      {},
      ...asked(row),
      samples ? el("p", { class: "facts" }, samples) : null,
      el("div", { class: "pair" }, side(titles[0], left), side(titles[1], right)),
    ),
  );
}

// Each question with its answers on two sides. Of another run those to the same question.
async function pairsOf(run, against) {
  const rows = await unpack(`answers-${run}`);
  if (against < 0) return rows.map((row) => ({ row, left: row.before, right: row.after }));
  const others = new Map((await unpack(`answers-${against}`)).map((row) => [row.uid, row]));
  const isSame = (row) => others.get(row.uid)?.question === row.question && others.get(row.uid).gold === row.gold;
  return rows.filter(isSame).map((row) => ({ row, left: others.get(row.uid).after, right: row.after }));
}

const wordsOf = ({ row, left, right }) =>
  [row.uid, row.question, row.gold ?? "", ...(row.choices || [])].concat([...left, ...right].map((r) => r.text));

let looking = 0; // as `asking`
async function showChanged() {
  const mine = ++looking;
  choose(
    "changed-run",
    runs.map((run) => [run.name, run.name]),
  );
  const run = runOf("changed-run");
  const others = runs.filter((_, i) => i !== run);
  const against = choose("against", [
    ["", "the same before training"],
    ...others.map(({ name, after }) => [name, `${name}, ${after || "after"}`]),
  ]);
  put("find", seen("find"));
  let pairs;
  try {
    pairs = await pairsOf(
      run,
      runs.findIndex(({ name }) => against && name === against),
    );
  } catch (error) {
    if (mine === looking) byId("answers").replaceChildren(unreadable(error));
    return;
  }
  if (mine !== looking) return;
  for (const pair of pairs) pair.move = moveOf(pair.left, pair.right);
  const kinds = [...new Set(pairs.map(({ row }) => row.kind))].filter((kind) => kind != null).sort();
  const kind = choose("kind", [["", "all kinds"], ...kinds.map((name) => [handle(name), name])]);
  byId("kind").parentElement.hidden = !kinds.length;
  const isOfKind = ({ row }) => !kind || (row.kind != null && handle(row.kind) === kind);
  const words = seen("find").trim().toLowerCase();
  const chosen = pairs.filter((pair) => isOfKind(pair) && holds(wordsOf(pair), words));
  const count = (of, name) => of.filter(({ move }) => move === name).length;
  const isGraded = pairs.some(({ move }) => move in about.moves);
  const isThere = (name) => (name in about.moves ? isGraded : count(pairs, name) > 0);
  const names = Object.keys(MOVES).filter(isThere);
  const usual = names.find((name) => count(pairs, name)); // gained ones, if there are any
  const labels = names.map((name) => [name, `${MOVES[name]} (${count(chosen, name)})`]);
  const move = choose("move", labels, usual);
  const found = chosen.filter((pair) => pair.move === move).sort((a, b) => Math.abs(rise(b)) - Math.abs(rise(a)));
  const isOver = ({ after }) => !after || after === "after";
  const usually = isOver(runs[run]) ? "before and after training" : `before training and ${runs[run].after}`;
  const other = runs.find(({ name }) => name === against);
  const sides = against ? "after one run and after the other" : usually;
  byId("moved").textContent = pairs.length
    ? `Greedy answers to held-out questions, ${sides}: ${found.length} of ${pairs.filter(isOfKind).length} ${named(move)}` +
      (isGraded ? "; those whose samples changed most come first." : ".")
    : other?.answers && runs[run].answers
      ? "The two runs have no held-out question in common; another seed or other data has others."
      : `No held-out answers ${sides}: there are none yet, or none were asked for.`;
  const lines = kinds.map((name) => {
    const of = pairs.filter(({ row }) => row.kind === name);
    return [name, of.length, ...names.map((one) => count(of, one))];
  });
  const table = () => tableOf(["kind", "questions", ...names.map(named)], lines);
  byId("kinds").replaceChildren(...(lines.length ? [table()] : []));
  const titleOf = (one) => el("span", {}, brief(one.name, 60), isOver(one) ? "" : `, ${one.after}`);
  const titles = () => (against ? [titleOf(other), titleOf(runs[run])] : ["before", runs[run].after]);
  paged(byId("answers"), byId("more-answers"), found, (pair) => changedCard(pair, titles(), run));
}

function changedControls() {
  for (const id of ["changed-run", "against"]) byId(id).parentElement.hidden = runs.length === 1;
  for (const id of ["changed-run", "against", "move", "kind"])
    byId(id).onchange = (event) => (say(id, event.target.value), showChanged());
  let waiting;
  byId("find").oninput = (event) => {
    say("find", event.target.value);
    clearTimeout(waiting);
    waiting = setTimeout(showChanged, 200);
  };
}
