"use strict";
// What was run, and its curves.

function facts(run) {
  const c = run.config;
  const start = [c.adapter && `with ${c.adapter}`, c.init_adapter && `from ${c.init_adapter}`, c.quantize];
  const found = {
    model: [c.model, ...start].filter(Boolean).join(", "),
    data: c.from_shards ? `shards of ${c.from_shards}` : c.data,
    reward: c.algorithm === "sft" ? `${c.reward}, by cross-entropy` : `${c.reward}, advantage ${c.advantage}`,
    steps: `${c.steps} of ${run.asked ?? c.questions_per_step} questions × ${c.group_size} responses, seed ${c.seed}`,
    state: run.state,
    begun: run.begun,
    time: duration(total(run.seconds)) + (run.finished ? "" : " so far"),
    device: c.device + (c.gpus > 1 ? `, ${c.gpus} processes` : ""),
    versions: Object.entries(run.versions)
      .map((pair) => pair.join(" "))
      .join(", "),
  };
  const line = ([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, brief(value ?? "–")));
  return scrolled("what was run", el("tbody", {}, ...Object.entries(found).map(line)));
}

function alarms(run) {
  const names = {};
  for (const [step, found] of Object.entries(run.alarms))
    for (const name of found) (names[name] ??= []).push(Number(step) + 1);
  const said = Object.entries(names).map(
    ([name, at]) => `${name} at step ${at[0]}${at.length > 1 ? ` and ${at.length - 1} more` : ""}`,
  );
  return said.length
    ? el("p", { class: "warn" }, `Alarms: ${said.join(", ")}.`)
    : el("p", { class: "quiet" }, "No alarm.");
}

function leftOut(run) {
  const steps = Object.entries(run.left_out);
  const [[step, count] = []] = steps;
  const more = steps.length > 1 ? `, and some at ${steps.length - 1} more steps` : "";
  const why = "rows that cannot be used, or prompts that are too long; the terminal named them";
  return (
    step && el("p", { class: "warn" }, `Left out: ${count} questions of step ${Number(step) + 1}${more} (${why}).`)
  );
}

function oneRun(run) {
  const found = [facts(run)];
  if (run.table.length) {
    const cells = ({ questions, before, after, difference }) =>
      run.after ? [questions, before, after, difference] : [questions, before];
    const rows = run.table.map((row) => [row.name.replace("_", " "), ...cells(row)]);
    const names = cells({ questions: "questions", before: "before", after: run.after, difference: "difference" });
    const said = ["Per cent, length in tokens, entropy in nats; 95 % intervals over questions."];
    if (!run.after) said.push("Those after training come when it has ended.");
    said.push(run.note_on_scores);
    found.push(tableOf(["held out", ...names], rows), el("p", { class: "quiet" }, said.join(" ")));
  }
  const [what, command] = run.finished ? ["To score it again, or ask it:", run.again] : ["To go on:", run.command];
  found.push(...[alarms(run), leftOut(run)].filter(Boolean));
  if (!run.running) found.push(el("p", {}, what), el("pre", { tabindex: "0", dir: "auto" }, command));
  return found;
}

function severalRuns() {
  for (const { title, rows } of about.tables)
    byId("head").append(...(title ? [el("h3", {}, brief(title))] : []), tableOf(rows[0], rows.slice(1)));
  const rows = runs.map((run) => {
    const scores = ["mean", "greedy", "pass"].map((name) => {
      const values = (run.held_out[name] || []).map(([, value]) => percent(value));
      return values.length > 1 ? `${values[0]} → ${values.at(-1)}` : values[0];
    });
    const c = run.config;
    const alarmed = Object.keys(run.alarms).length || "–";
    const asked = run.table[0]?.questions;
    const settings = [run.name, c.reward, c.advantage, c.seed];
    return [...settings, run.state, duration(total(run.seconds)), asked, ...scores, alarmed];
  });
  const names = [
    "run",
    "reward",
    "advantage",
    "seed",
    "state",
    "time",
    "questions",
    "mean",
    "greedy",
    "pass@k",
    "steps with alarms",
  ];
  const each = runs.map((run) => {
    const details = el("details", {}, el("summary", {}, brief(run.name)), ...oneRun(run));
    return el("div", { "data-card": `run ${run.name}` }, details);
  });
  const few = runs.find((run) => run.note_on_scores)?.note_on_scores ?? "";
  byId("head").append(
    el("h3", {}, "Each run"),
    tableOf(names, rows, (i) => i > 4),
    el("p", { class: "quiet" }, `Per cent of held-out questions, before → after, or the last evaluation. ${few}`),
    ...each,
  );
}

const head = () => (runs.length === 1 ? byId("head").append(...oneRun(runs[0])) : severalRuns());

// -------------------------------------------------------------------------------------------------------------- curves

const COLOURS = 8; // of page.css; the ninth line has the first one's colour, and dashes
const DASHES = [null, [10, 5], [2, 4], [10, 4, 2, 4]];
const plots = []; // what draws each of them

const looks = (i) => ({ colour: `--c${i % COLOURS}`, dash: DASHES[Math.floor(i / COLOURS) % DASHES.length] });

// Means of the last `width` values that are there.
function smoothed(values, width) {
  return values.map((value, i) => {
    if (value == null) return null;
    const window = values.slice(Math.max(0, i - width + 1), i + 1).filter((x) => x != null);
    return total(window) / window.length;
  });
}

// Lines {x, y} as columns over all of their steps.
function aligned(lines) {
  const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const columns = lines.map((line) => {
    const at = new Map(line.x.map((x, i) => [x, line.y[i]]));
    return steps.map((x) => at.get(x) ?? null);
  });
  return [steps, columns];
}

// A line for each run that has some, {x, y} by `pick(run)`. Runs that differ in the seed alone have one colour: thin
// lines, and a thick one for their mean, at the steps that all of them have made.
function linesOf(pick) {
  const variants = [...new Set(runs.map((run) => run.variant))];
  return variants.flatMap((variant, i) => {
    const found = runs.filter((run) => run.variant === variant).map((run) => ({ label: run.name, run, ...pick(run) }));
    const lines = found.filter((line) => line.x?.length).map((line) => ({ ...line, ...looks(i) }));
    if (lines.length < 2) return lines;
    const [steps, columns] = aligned(lines);
    const shared = steps.map((_, at) => at).filter((at) => columns.every((y) => y[at] != null));
    const y = shared.map((at) => total(columns.map((column) => column[at])) / columns.length);
    const mean = { label: `${variant}, mean of ${lines.length}`, x: shared.map((at) => steps[at]), y, ...looks(i) };
    return [mean, ...lines.map((line) => ({ ...line, thin: true }))];
  });
}

// The values that an axis shows: a tenth more than there are, and of what hardly changes some more.
function around(low, high) {
  if (low == null) return [0, 1];
  const room = Math.max((high - low) / 10, Math.max(Math.abs(low), Math.abs(high)) / 50) || 1;
  return [low - room, high + room];
}

// `points`: the values stand alone, and are neither smoothed nor led to by steps.
function figure(title, lines, points = false) {
  if (!lines.length) return;
  const [steps, columns] = aligned(lines);
  const box = el("figure", {}, el("figcaption", {}, title));
  byId("plots").append(box);
  const named = lines.map((line, i) => [plain(line.label), columns[i].findLast((y) => y != null), line.thin]);
  const said = named.filter(([, , thin]) => !thin).map(([name, y]) => `${name} ${compact(y)}`);
  let plot = null;

  // The run that a click is on: of those that have the step, the one whose line is nearest.
  function clicked() {
    const at = plot.cursor.idx;
    if (at == null) return;
    const away = (i) => Math.abs(plot.valToPos(plot.data[i + 1][at], "y") - plot.cursor.top);
    const isThere = (i) => columns[i][at] != null && lines[i].run?.parts.includes(steps[at] - 1);
    const [nearest] = [...lines.keys()].filter(isThere).sort((a, b) => away(a) - away(b));
    goTo({ step: steps[at], ...(nearest == null ? {} : { run: lines[nearest].run.name }) });
  }

  function draw() {
    plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name);
    const axis = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const series = lines.map((line, i) => ({
      label: named[i][0],
      stroke: colour(line.colour),
      dash: line.dash,
      width: line.thin ? 1 : 2.25,
      alpha: line.thin ? 0.5 : 1,
      spanGaps: true,
      points: { show: (points && !line.thin) || columns[i].filter((y) => y != null).length === 1, size: 7 },
      value: (_, value) => compact(value),
    }));
    const first = { label: points ? "steps made" : "step", value: (_, x) => (x == null ? "–" : `${x}`) };
    const options = {
      width: Math.max(box.clientWidth, 240),
      height: 200,
      scales: { x: { time: false }, y: { range: (_, low, high) => around(low, high) } },
      axes: [
        { ...axis, size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] },
        { ...axis, size: 60, values: (_, ticks) => ticks.map((y) => `${Number(compact(y))}`) },
      ],
      cursor: { sync: { key: "steps" } },
      legend: { markers: { dash: (_, i) => (i && lines[i - 1].dash ? "dashed" : "solid") } },
      series: [first, ...series],
    };
    const width = points ? 1 : Number(seen("smooth", 1));
    plot = new uPlot(options, [steps, ...columns.map((y) => smoothed(y, width))], box);
    plot.root.setAttribute("role", "img");
    plot.root.setAttribute("aria-label", plain(`${title}, at the end: ${said.join(", ")}`, 300));
    plot.root.querySelectorAll(".u-series").forEach((row, i) => (row.hidden = !!lines[i - 1]?.thin));
    if (!points) plot.over.onclick = clicked;
  }
  draw();
  plots.push(draw);
}

function curves() {
  const scores = ["mean", "greedy", "maj", "pass"];
  const scored = (run, name) => ({
    x: (run.held_out[name] || []).map(([step]) => step),
    y: (run.held_out[name] || []).map(([, value]) => value),
  });
  const stepped = (run, y) => ({ x: y ? run.curves.step.map((step) => step + 1) : [], y });
  const stages = (run) => Object.keys(run.curves).filter((name) => name.startsWith("seconds "));
  const seconds = (run) => run.curves.step.map((_, i) => total(stages(run).map((name) => run.curves[name][i] || 0)));
  const one = (pairs) =>
    pairs.map(([label, line], i) => ({ label, ...line, ...looks(i) })).filter((line) => line.x.length);

  if (runs.length === 1) figure("held out", one(scores.map((name) => [name, scored(runs[0], name)])), true);
  else
    for (const name of scores)
      figure(
        `held out: ${name}`,
        linesOf((run) => scored(run, name)),
        true,
      );
  for (const [name, title] of Object.entries(about.names))
    figure(
      title,
      linesOf((run) => stepped(run, run.curves[name])),
    );
  if (runs.length === 1) {
    const stage = (name) => [name.slice("seconds ".length), stepped(runs[0], runs[0].curves[name])];
    figure("seconds of a step", one(stages(runs[0]).map(stage)));
  } else
    figure(
      "seconds of a step",
      linesOf((run) => stepped(run, stages(run).length ? seconds(run) : null)),
    );
  if (!plots.length) byId("plots").append(el("p", { class: "quiet" }, "Nothing yet."));

  byId("smooth").oninput = () => (say("smooth", byId("smooth").value, 1), showCurves());
  matchMedia("(prefers-color-scheme: dark)").onchange = showCurves;
  let wide = innerWidth;
  addEventListener("resize", () => innerWidth !== wide && ((wide = innerWidth), showCurves()));
  showCurves();
}

function showCurves() {
  put("smooth", seen("smooth", 1));
  byId("smoothed").value = byId("smooth").value;
  plots.forEach((draw) => draw());
}
