"use strict";
// Whatever comes from models and data reaches the page as text nodes, or through KaTeX, which trusts nothing.
(() => {
  const byId = (id) => document.getElementById(id);
  const about = JSON.parse(byId("about").textContent);
  const runs = about.runs;

  const AT_ONCE = 20; // cards
  const LONG = 3000; // characters of a text, of which the middle is then left out at first
  const WITH_MATHS = 5000; // up to so many characters LaTeX is typeset
  const HUES = [212, 28, 280, 140, 340, 180, 60, 0];
  const FLAGS = {
    "": "all groups",
    wrong: "majority wrong",
    split: "split: half or less agree",
    skipped: "skipped",
    abstained: "with abstentions",
    cut: "with responses cut off",
    judge: "judge against majority",
  };
  const ORDERS = {
    "as they were asked": null,
    "least agreed first": (a, b) => a.share - b.share,
    "most agreed first": (a, b) => b.share - a.share,
    "longest first": (a, b) => tokens(b) - tokens(a),
  };
  const tokens = (group) => group.responses.reduce((sum, r) => sum + r.tokens, 0);

  function el(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes || {})) if (value != null) node.setAttribute(key, value);
    node.append(...children.filter((child) => child != null && child !== ""));
    return node;
  }

  // ----------------------------------------------------------------------------------------------------------- parts

  const unpacked = new Map();
  async function unpack(id) {
    if (!unpacked.has(id)) {
      const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(id, JSON.parse(await new Response(stream).text()));
      if (unpacked.size > 64) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(id);
  }

  // ------------------------------------------------------------------------------------------------------------ text

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

  function closing(text, start) { // where the brace that opens before `start` closes, or -1
    for (let i = start, depth = 1; i < text.length; i++) {
      if (text[i] === "\\") i++;
      else if (text[i] === "{") depth++;
      else if (text[i] === "}" && --depth === 0) return i;
    }
    return -1;
  }

  const MATHS = /\$\$([^]+?)\$\$|\$(?!\s)([^$\n]*?[^$\n\s\\])\$(?!\d)|\\\(([^]+?)\\\)|\\\[([^]+?)\\\]|\\boxed\{/g;
  function withMaths(text) {
    const nodes = [];
    let at = 0;
    MATHS.lastIndex = 0;
    for (let found; (found = MATHS.exec(text)); ) {
      let end = MATHS.lastIndex, node;
      if (found[0] === "\\boxed{") {
        const close = closing(text, end);
        if (close < 0) continue;
        const inside = text.slice(end, close);
        const content = /[\\^_]/.test(inside) ? typeset(inside, false, inside) : inside;
        node = el("span", { class: "boxed" }, content);
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

  function prose(text, name = "span", style = "text") {
    const box = el(name, { class: style, dir: "auto" });
    const fill = (part) => box.replaceChildren(...(part.length <= WITH_MATHS ? withMaths(part) : [part]));
    if (text.length <= LONG) return fill(text), box;
    fill(`${text.slice(0, LONG / 2)} … ${text.slice(-LONG / 2)}`);
    const all = el("button", { type: "button" }, `all ${text.length.toLocaleString("en")} characters`);
    all.onclick = () => (fill(text), all.remove());
    return el("div", {}, box, all);
  }

  const number = (x, digits = 3) => (x == null ? "–" : (Math.round(x * 10 ** digits) / 10 ** digits + 0).toFixed(digits));
  const signed = (x) => (x > 0 ? "+" : "") + number(x);
  const percent = (x) => number(100 * x, 1);
  const duration = (s) => (s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${number(s / 3600, 1)} h`);
  const total = (of) => Object.values(of).reduce((sum, s) => sum + s, 0);
  const mark = (right) =>
    right == null ? null : el("span", { class: right ? "good" : "bad" }, right ? "✓ right" : "✗ wrong");
  const answer = (key) => (key == null ? el("i", {}, "no answer") : el("bdi", {}, key));

  function tableOf(head, rows, numbers = () => true) {
    const style = (i) => (i && numbers(i) ? "n" : null);
    return el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": `table by ${head[0] || "score"}` },
      el("table", {},
        el("thead", {}, el("tr", {}, ...head.map((cell, i) => el("th", { class: style(i), scope: "col" }, cell)))),
        el("tbody", {}, ...rows.map((row) =>
          el("tr", {}, ...row.map((cell, i) => (i ? el("td", { class: style(i) }, cell ?? "") : el("th", { scope: "row" }, cell))))))));
  }

  function choose(select, options, changed) {
    select.replaceChildren(...options.map(([value, label]) => el("option", { value }, label)));
    select.onchange = changed;
  }

  // ------------------------------------------------------------------------------------------------------------ head

  function oneRun(run) {
    const c = run.config, facts = {
      model: [c.model, c.adapter && `with ${c.adapter}`, c.init_adapter && `from ${c.init_adapter}`, c.quantize].filter(Boolean).join(", "),
      data: c.data,
      reward: c.algorithm === "sft" ? `${c.reward}, by cross-entropy` : `${c.reward}, advantage ${c.advantage}`,
      steps: `${c.steps} of ${c.questions_per_step} questions × ${c.group_size} responses, seed ${c.seed}`,
      state: run.state,
      time: duration(total(run.seconds)) + (run.finished ? "" : " so far"),
    };
    const list = el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "what was run" }, el("table", {}, el("tbody", {},
      ...Object.entries(facts).map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name), el("td", {}, value))))));
    const found = [list];
    if (run.table.length) {
      const rows = run.table.map((row) => [row.name.replace("_", " "), row.before, row.after, row.difference]);
      found.push(tableOf(["held out", "before", "after", "difference"], rows),
        el("p", { class: "quiet" }, "Per cent, length in tokens, entropy in nats; 95 % intervals over questions."));
    }
    found.push(alarms(run));
    if (!run.finished) found.push(el("p", {}, "To go on:"), el("pre", { tabindex: "0" }, run.command));
    else found.push(el("p", {}, "To score it again, or ask it:"), el("pre", { tabindex: "0" }, run.again));
    return found;
  }

  function alarms(run) {
    const steps = Object.entries(run.alarms);
    if (!steps.length) return el("p", { class: "quiet" }, "No alarm.");
    const names = {};
    for (const [step, found] of steps) for (const name of found) (names[name] ??= []).push(+step + 1);
    const said = Object.entries(names).map(([name, at]) => `${name} at step ${at[0]}${at.length > 1 ? ` and ${at.length - 1} more` : ""}`);
    return el("p", { class: "warn" }, `Alarms: ${said.join(", ")}.`);
  }

  function head() {
    if (runs.length === 1) return byId("head").append(...oneRun(runs[0]));
    const rows = runs.map((run) => {
      const scores = ["mean", "greedy", "pass"].map((name) => {
        const points = run.held_out[name] || [];
        const values = points.map(([, value]) => percent(value));
        return values.length > 1 ? `${values[0]} → ${values.at(-1)}` : values[0];
      });
      const time = duration(total(run.seconds));
      return [run.name, run.config.reward, run.config.advantage, `${run.config.seed}`, run.state, time, ...scores,
        `${Object.keys(run.alarms).length || "–"}`];
    });
    byId("head").append(
      tableOf(["run", "reward", "advantage", "seed", "state", "time", "mean", "greedy", "pass@k", "steps with alarms"], rows, (i) => i > 2),
      el("p", { class: "quiet" }, "Per cent of held-out questions, before → after."));
    for (const rows of about.tables) byId("head").append(tableOf(rows[0], rows.slice(1)));
  }

  // ---------------------------------------------------------------------------------------------------------- curves

  const plots = [];
  const colour = (i) => `hsl(${HUES[i % HUES.length]} 70% ${matchMedia("(prefers-color-scheme: dark)").matches ? 65 : 42}%)`;

  function smoothed(values, width) { // mean of the last `width` that are there
    return values.map((value, i) => {
      if (value == null) return null;
      const window = values.slice(Math.max(0, i - width + 1), i + 1).filter((x) => x != null);
      return window.reduce((a, b) => a + b, 0) / window.length;
    });
  }

  function aligned(lines) { // [{label, x, y}] → uPlot's columns
    const steps = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const columns = lines.map((line) => {
      const at = new Map(line.x.map((x, i) => [x, line.y[i]]));
      return steps.map((x) => at.get(x) ?? null);
    });
    return [steps, columns];
  }

  function figure(title, lines, points) {
    const [steps, columns] = aligned(lines);
    const box = el("figure", {}, el("figcaption", {}, title));
    const last = columns.map((y) => y.findLast((value) => value != null));
    byId("plots").append(box);
    let plot = null;
    const draw = () => {
      plot?.destroy();
      const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--quiet"), line = style.getPropertyValue("--line");
      const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { show: false } };
      const width = points ? 1 : +byId("smooth").value;
      const series = lines.map((l, i) => ({
        label: l.label, stroke: colour(i), width: 2, spanGaps: true, points: { show: !!points, size: 7 },
        value: (_, value) => number(value, 4),
      }));
      plot = new uPlot({
        width: Math.max(box.clientWidth, 240), height: 200, scales: { x: { time: false } }, axes: [axis, { ...axis, size: 56 }],
        cursor: { sync: { key: "steps" } }, legend: { live: true },
        series: [{ label: points ? "steps made" : "step", value: (_, x) => (x == null ? "–" : `${x}`) }, ...series],
      }, [steps, ...columns.map((y) => smoothed(y, width))], box);
      const wrap = box.querySelector(".u-wrap");
      wrap.setAttribute("role", "img");
      wrap.setAttribute("aria-label", `${title}, at the end: ${lines.map((l, i) => `${l.label} ${number(last[i], 4)}`).join(", ")}`);
    };
    draw();
    plots.push(draw);
  }

  function curves() {
    const scored = (run, name, label) => ({
      label, x: run.held_out[name].map(([step]) => step), y: run.held_out[name].map(([, value]) => value),
    });
    const names = ["mean", "greedy", "maj", "pass"];
    if (runs.length === 1) {
      const lines = names.filter((name) => runs[0].held_out[name]).map((name) => scored(runs[0], name, name));
      if (lines.length) figure("held out", lines, true);
    }
    for (const name of runs.length > 1 ? names : []) {
      const lines = runs.filter((run) => run.held_out[name]).map((run) => scored(run, name, run.name));
      if (lines.length) figure(`held out: ${name}`, lines, true);
    }
    for (const [name, title] of Object.entries(about.names)) {
      const lines = runs.filter((run) => run.curves[name]).map((run) => ({ label: run.name, x: run.curves.step, y: run.curves[name] }));
      if (lines.length) figure(title, lines, false);
    }
    const stages = (run) => Object.keys(run.curves).filter((name) => name.startsWith("seconds "));
    if (runs.length === 1) {
      const lines = stages(runs[0]).map((name) => ({ label: name.slice(8), x: runs[0].curves.step, y: runs[0].curves[name] }));
      if (lines.length) figure("seconds of a step", lines, false);
    } else {
      const lines = runs.filter((run) => stages(run).length).map((run) => ({
        label: run.name, x: run.curves.step, y: run.curves.step.map((_, i) => stages(run).reduce((sum, name) => sum + (run.curves[name][i] || 0), 0)),
      }));
      if (lines.length) figure("seconds of a step", lines, false);
    }
    if (!plots.length) byId("plots").append(el("p", { class: "quiet" }, "Nothing yet."));
    const again = () => plots.forEach((draw) => draw());
    byId("smooth").oninput = () => ((byId("smoothed").value = byId("smooth").value), again());
    matchMedia("(prefers-color-scheme: dark)").onchange = again;
    let wide = innerWidth;
    addEventListener("resize", () => innerWidth !== wide && ((wide = innerWidth), again()));
  }

  // ---------------------------------------------------------------------------------------------------------- groups

  function pictureOf(source, question) {
    if (source == null) return null;
    const node = el("img", { src: source, alt: `picture of the question: ${question.slice(0, 200)}`, loading: "lazy" });
    node.onload = () => node.naturalWidth <= 160 && node.classList.add("small");
    node.onerror = () => node.replaceWith(el("p", { class: "quiet" }, `the picture is not there: ${source.slice(0, 200)}`));
    return node;
  }

  function asked(item) {
    const options = item.choices?.map((choice) => el("li", {}, prose(choice)));
    return [
      prose(item.question, "p", "question"),
      options && el("ol", { class: "options", type: "A" }, ...options),
      item.gold == null ? null : el("p", { class: "facts" }, el("span", {}, "gold ", el("bdi", {}, item.gold))),
    ];
  }

  function judgement(judge) {
    if (!judge) return null;
    const score = judge.score == null ? "not read" : number(judge.score, 2);
    return el("span", {}, `judge ${score}`);
  }

  function response(r, hues) {
    const said = r.judge?.judgements || [];
    const node = el("li", {},
      prose(r.text),
      el("div", { class: "facts" },
        el("span", {}, "answer ", answer(r.key)),
        mark(r.right),
        r.reward == null ? null : el("span", {}, `reward ${number(r.reward)}`),
        r.advantage == null ? null : el("span", {}, `advantage ${signed(r.advantage)}`),
        judgement(r.judge),
        el("span", {}, `${r.tokens} tokens`),
        r.cut ? el("span", { class: "warn" }, "cut off") : null,
        r.view ? el("span", {}, `sees it ${r.view}`) : null),
      said.length ? el("details", {}, el("summary", {}, "what the judge wrote"), ...said.map((text) => prose(text))) : null);
    if (r.key != null) node.style.setProperty("--key", `hsl(${hues.get(r.key)} 65% 50%)`);
    return node;
  }

  function huesOf(keys) {
    const count = new Map();
    for (const key of keys) if (key != null) count.set(key, (count.get(key) || 0) + 1);
    const ordered = [...count].sort((a, b) => b[1] - a[1]).map(([key]) => key);
    return new Map(ordered.map((key, i) => [key, HUES[i % HUES.length]]));
  }

  function card(run, step, group) {
    const hues = huesOf(group.responses.map((r) => r.key));
    const place = `#${new URLSearchParams({ run, step, uid: group.uid })}`;
    const tags = group.flags.map((flag) => el("span", { class: `tag ${flag === "wrong" ? "bad" : "warn"}` }, FLAGS[flag].split(":")[0]));
    const vote = group.majority == null ? "no majority" : "majority ";
    const picture = pictureOf(group.image, group.question);
    return el("article", { class: picture ? "card" : "card plain" },
      el("h3", {}, el("bdi", {}, group.uid), " ", ...tags, " ", el("a", { href: place, "aria-label": `link to group ${group.uid} of step ${step + 1}` }, `step ${step + 1}, link`)),
      picture,
      el("div", {}, ...asked(group),
        el("p", { class: "facts" }, el("span", {}, vote, group.majority == null ? "" : el("bdi", {}, group.majority), ` with ${percent(group.share)} %`))),
      el("div", { class: "foot" }, el("ol", { class: "responses" }, ...group.responses.map((r) => response(r, hues)))));
  }

  const matches = (group, words, flag) =>
    (!flag || group.flags.includes(flag)) &&
    (!words || [group.uid, group.question, group.gold || "", ...(group.choices || []), ...group.responses.map((r) => r.text)]
      .some((text) => text.toLowerCase().includes(words)));

  let asking = 0; // the latest search; an earlier one that is still going on ends
  async function showGroups(wanted) {
    const mine = ++asking, run = +byId("run").value, parts = runs[run].parts;
    const at = Math.min(+byId("step").value, Math.max(parts.length - 1, 0));
    byId("stepped").value = parts.length ? `${parts[at] + 1} of ${runs[run].config.steps}` : "";
    const words = byId("search").value.trim().toLowerCase(), flag = byId("flag").value;
    const steps = byId("everywhere").checked ? parts : parts.slice(at, at + 1);
    let found = [], all = 0;
    for (const step of steps) {
      const groups = await unpack(`groups-${run}-${step}`);
      if (mine !== asking) return;
      all += groups.length;
      for (const group of groups) if (matches(group, words, flag)) found.push([step, group]);
      if (steps.length > 1) byId("found").textContent = `looking: step ${step + 1}, ${found.length} found`;
    }
    const order = ORDERS[byId("order").value];
    if (order) found.sort(([, a], [, b]) => order(a, b));
    if (wanted) found = [...found.filter(([, g]) => g.uid === wanted), ...found.filter(([, g]) => g.uid !== wanted)];
    byId("found").textContent = parts.length ? `${found.length} of ${all} groups` : "No groups yet.";
    paged(byId("cards"), byId("more"), found, ([step, group]) => card(run, step, group));
  }

  function paged(box, button, items, make) {
    let shown = 0;
    const more = () => {
      box.append(...items.slice(shown, shown + AT_ONCE).map(make));
      shown = Math.min(shown + AT_ONCE, items.length);
      button.hidden = shown === items.length;
      button.textContent = `Show more: ${items.length - shown} left`;
    };
    box.replaceChildren();
    button.onclick = more;
    more();
  }

  function groupControls() {
    const names = runs.map((run, i) => [i, run.name]);
    const newRun = () => {
      const last = Math.max(runs[+byId("run").value].parts.length - 1, 0);
      byId("step").max = last;
      byId("step").value = last;
      showGroups();
    };
    choose(byId("run"), names, newRun);
    choose(byId("flag"), Object.entries(FLAGS), () => showGroups());
    choose(byId("order"), Object.keys(ORDERS).map((name) => [name, name]), () => showGroups());
    byId("run").parentElement.hidden = byId("run-changed").parentElement.hidden = runs.length === 1;
    byId("step").oninput = byId("everywhere").onchange = () => showGroups();
    let waiting;
    byId("search").oninput = () => (clearTimeout(waiting), (waiting = setTimeout(showGroups, 200)));
    addEventListener("hashchange", followed);
    if (!followed()) newRun();
  }

  function followed() { // to the card that the address names
    const named = new URLSearchParams(location.hash.slice(1)), run = +named.get("run"), at = runs[run]?.parts.indexOf(+named.get("step"));
    if (!named.has("uid") || !(at >= 0)) return false;
    byId("run").value = run;
    byId("step").max = runs[run].parts.length - 1;
    byId("step").value = at;
    byId("flag").value = byId("search").value = "";
    byId("everywhere").checked = false;
    showGroups(named.get("uid")).then(() => byId("cards").scrollIntoView());
    return true;
  }

  // --------------------------------------------------------------------------------------------------------- changed

  const MOVES = {
    "newly right": (a, b) => a.correct === false && b.correct,
    "newly wrong": (a, b) => a.correct && b.correct === false,
    "still wrong": (a, b) => a.correct === false && b.correct === false,
    "still right": (a, b) => a.correct && b.correct,
    "another answer": (a, b) => a.correct == null && a.key !== b.key,
    "the same answer": (a, b) => a.correct == null && a.key === b.key,
  };
  const moveOf = (row) => Object.keys(MOVES).find((name) => MOVES[name](row.before[0], row.after[0]));

  function side(title, responses) {
    const [greedy, ...samples] = responses, votes = new Map();
    for (const r of samples) votes.set(r.key, (votes.get(r.key) || 0) + 1);
    const counted = [...votes].sort((a, b) => b[1] - a[1]).flatMap(([key, n], i) => [i ? ", " : "", `${n} × `, answer(key)]);
    return el("div", {}, el("h4", {}, title, " ", mark(greedy.correct)), prose(greedy.text),
      samples.length ? el("p", { class: "facts" }, el("span", {}, `${samples.length} samples: `, ...counted)) : null,
      samples.length ? el("details", {}, el("summary", {}, "all samples"), ...samples.map((r) => el("div", {}, prose(r.text), " ", mark(r.correct)))) : null);
  }

  function changedCard(row) {
    const picture = pictureOf(row.image, row.question);
    return el("article", { class: picture ? "card" : "card plain" },
      el("h3", {}, el("bdi", {}, row.uid), " ", el("span", { class: "tag quiet" }, moveOf(row)), row.kind ? el("span", { class: "tag quiet" }, row.kind) : null),
      picture, el("div", {}, ...asked(row), el("div", { class: "pair" }, side("before", row.before), side("after", row.after))));
  }

  let looking = 0; // as `asking`
  async function showChanged() {
    const mine = ++looking, rows = await unpack(`answers-${+byId("run-changed").value}`);
    if (mine !== looking) return;
    const kinds = [...new Set(rows.map((row) => row.kind))].filter((kind) => kind != null).sort();
    const kind = kinds.includes(byId("kind").value) ? byId("kind").value : "";
    choose(byId("kind"), [["", "all kinds"], ...kinds.map((name) => [name, name])], showChanged);
    byId("kind").value = kind;
    byId("kind").parentElement.hidden = !kinds.length;
    const moves = Object.keys(MOVES).filter((name) => rows.some((row) => moveOf(row) === name));
    const move = moves.includes(byId("move").value) ? byId("move").value : moves[0];
    choose(byId("move"), moves.map((name) => [name, `${name} (${rows.filter((row) => moveOf(row) === name).length})`]), showChanged);
    byId("move").value = move;
    const found = rows.filter((row) => moveOf(row) === move && (!kind || row.kind === kind));
    byId("moved").textContent = rows.length
      ? `Greedy answers to held-out questions, before and after training: ${found.length} of ${rows.length} ${move}.`
      : "No held-out answers before and after: the run has none yet, or none were asked for.";
    const lines = kinds.map((name) => {
      const of = rows.filter((row) => row.kind === name);
      return [name, `${of.length}`, ...moves.map((m) => `${of.filter((row) => moveOf(row) === m).length}`)];
    });
    byId("kinds").replaceChildren(...(lines.length ? [tableOf(["kind", "questions", ...moves], lines)] : []));
    paged(byId("answers"), byId("more-answers"), found, changedCard);
  }

  head();
  curves();
  groupControls();
  choose(byId("run-changed"), runs.map((run, i) => [i, run.name]), showChanged);
  showChanged();
  document.documentElement.dataset.ready = "yes";
})();
