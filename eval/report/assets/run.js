"use strict";
// What was run.

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
    machine: (run.machine ?? c.device) + (c.gpus > 1 ? `, ${c.gpus} processes` : ""),
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
