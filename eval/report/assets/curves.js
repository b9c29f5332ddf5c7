"use strict";
// Curves of a run, or of several over one another, by step.

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
  const named = lines.map((line) => plain(line.label));
  const count = points ? "steps made" : "step";
  const keys = { at: steps.length - 1, on: 0 }; // where the arrow keys are: at which step, on which line
  let plot = null;

  // To the groups of the run that the cursor is on: of those that have the step, the one whose line is nearest.
  function lead() {
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
    const ruled = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
    const series = lines.map((line, i) => ({
      label: named[i],
      stroke: colour(line.colour),
      dash: line.dash,
      width: line.thin ? 1 : 2.25,
      alpha: line.thin ? 0.5 : 1,
      spanGaps: true,
      points: { show: (points && !line.thin) || columns[i].filter((y) => y != null).length === 1, size: 7 },
      value: (_, value) => compact(value),
    }));
    const first = { label: count, value: (_, x) => (x == null ? "–" : `${x}`) };
    const options = {
      width: Math.max(box.clientWidth, 240),
      height: 200,
      scales: { x: { time: false }, y: { range: (_, low, high) => around(low, high) } },
      axes: [
        { ...ruled, size: 28, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] },
        { ...ruled, size: 60, values: (_, ticks) => ticks.map((y) => `${Number(compact(y))}`) },
      ],
      cursor: { sync: { key: "steps" } },
      legend: { markers: { dash: (_, i) => (i && lines[i - 1].dash ? "dashed" : "solid") } },
      series: [first, ...series],
    };
    const width = points ? 1 : Number(seen("smooth", 1));
    plot = new uPlot(options, [steps, ...columns.map((y) => smoothed(y, width))], box);
    plot.root.querySelectorAll(".u-series").forEach((row, i) => (row.hidden = !!lines[i - 1]?.thin));
    if (!points) plot.over.onclick = lead;
    takeKeys(plot, title, keys, points ? () => {} : lead);
  }
  draw();
  plots.push(draw);
}

// Who uses no mouse goes along the curves by the arrow keys, as on a slider: left and right from step to step, up and
// down from line to line, and by Enter to where a click leads. `keys`: {at, on}, the step and the line, by index.
function takeKeys(plot, title, keys, enter) {
  const [steps, ...columns] = plot.data;
  const { over, series } = plot;
  const there = () => [...columns.keys()].filter((i) => columns[i][keys.at] != null);

  // The line that the keys are on comes first.
  function tell() {
    const others = there().filter((i) => i !== keys.on && series[i + 1].width > 1);
    const shown = [...there().filter((i) => i === keys.on), ...others];
    const said = shown.map((i) => `${series[i + 1].label} ${compact(columns[i][keys.at])}`).join(", ");
    over.setAttribute("aria-valuenow", steps[keys.at]);
    over.setAttribute("aria-valuetext", plain(`${series[0].label} ${steps[keys.at]}: ${said || "no value"}`, 300));
  }

  function point() {
    const y = columns[keys.on][keys.at];
    plot.setCursor({ left: plot.valToPos(steps[keys.at], "x"), top: y == null ? 0 : plot.valToPos(y, "y") });
  }

  over.onkeydown = (event) => {
    const sides = { ArrowLeft: keys.at - 1, ArrowRight: keys.at + 1, Home: 0, End: steps.length - 1 };
    const lines = { ArrowUp: -1, ArrowDown: 1 };
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own
    if (event.key === "Enter") return (point(), enter());
    if (!(event.key in sides || event.key in lines)) return;
    event.preventDefault(); // the page would scroll
    keys.at = Math.min(Math.max(sides[event.key] ?? keys.at, 0), steps.length - 1);
    const found = there();
    if (event.key in lines && found.length)
      keys.on = found.at((found.indexOf(keys.on) + lines[event.key]) % found.length);
    point();
    tell();
  };
  const range = { "aria-valuemin": steps[0], "aria-valuemax": steps.at(-1) };
  const said = { role: "slider", tabindex: 0, "aria-label": plain(title), ...range };
  for (const [name, value] of Object.entries(said)) over.setAttribute(name, value);
  tell();
}

function curves() {
  const scores = ["mean", "greedy", "maj", "pass"];
  const scored = (run, name) => ({
    x: (run.held_out[name] || []).map(([step]) => step),
    y: (run.held_out[name] || []).map(([, value]) => 100 * value),
  });
  const stepped = (run, y) => ({ x: y ? run.curves.step.map((step) => step + 1) : [], y });
  const stages = (run) => Object.keys(run.curves).filter((name) => name.startsWith("seconds "));
  const seconds = (run) => run.curves.step.map((_, i) => total(stages(run).map((name) => run.curves[name][i] || 0)));
  const one = (pairs) =>
    pairs.map(([label, line], i) => ({ label, ...line, ...looks(i) })).filter((line) => line.x.length);

  if (runs.length === 1) figure("held out, per cent", one(scores.map((name) => [name, scored(runs[0], name)])), true);
  else
    for (const name of scores)
      figure(
        `held out, per cent: ${name}`,
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
