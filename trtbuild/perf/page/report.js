"use strict";
// The page's choices, and what is drawn for them. `DATA` comes from report_html.py; rows are those of points.csv.

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "star", "hexagon", "cross"];
const BOUNDS = ["ttft", "itl", "tpot", "e2e"];
const rows = DATA.rows;
const series = [...new Set(rows.map((row) => row.series))];
const byId = (id) => document.getElementById(id);
const colour = (name) => COLOURS[series.indexOf(name) % COLOURS.length];
const symbol = (name) => SYMBOLS[series.indexOf(name) % SYMBOLS.length];
const is = (value) => value !== null && value !== undefined && value !== "";
const short = (value) => (typeof value === "number" ? String(Number(value.toPrecision(4))) : value);
const lengths = (row) => `${row.isl} → ${row.osl}`;
const unique = (values) => [...new Set(values)];
// Plotly reads some HTML in names and hover texts.
const plain = (text) => String(text ?? "").replace(/&/g, "&amp;").replace(/</g, "&lt;");
const charts = {};

function element(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (is(text)) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, label]) => element("option", label, { value })));
  if (is(chosen)) select.value = chosen;
  if (options.length < 2) select.closest("label").hidden = true;
}

function slo() {
  return Object.fromEntries(BOUNDS.map((name) => [name, parseFloat(byId(`slo-${name}`).value)])
    .filter(([, bound]) => bound > 0));
}

// A figure that was not measured does not meet a bound.
function meets(row, bounds) {
  const statistic = byId("statistic").value;
  return Object.entries(bounds).every(([name, bound]) => {
    const value = row[`${name}_${statistic}_ms`];
    return is(value) && value <= bound;
  });
}

const shown = () => rows.filter((row) => lengths(row) === byId("lengths").value);
const ofKind = () => shown().filter((row) => row.load_kind === byId("kind").value);
const hover = (row) => [
  `<b>${plain(row.series)}</b>, ${row.load}`, `${short(row.output_tokens_per_s)} tokens/s, ${short(row.requests_per_s)} requests/s`,
  `${short(row.user_tokens_per_s_mean)} tokens/s for each user`,
  `TTFT p50 ${short(row.ttft_p50_ms)} ms, p99 ${short(row.ttft_p99_ms)} ms`,
  `ITL p50 ${short(row.itl_p50_ms)} ms, p99 ${short(row.itl_p99_ms)} ms`,
  ...(row.valid ? [] : [`invalid: ${plain(row.why_invalid)}`]),
].join("<br>");

function draw(id, traces, layout, empty) {
  const usable = traces.some((trace) => (trace.x || trace.z || []).length);
  byId(`${id}-empty`).textContent = usable ? "" : empty;
  byId(id).hidden = !usable;
  delete charts[id];
  if (!usable) return null;
  const narrow = window.innerWidth < 600;
  const whole = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { size: narrow ? 11 : 13 },
    margin: { l: narrow ? 44 : 60, r: 12, t: 12, b: 50 }, height: 420, hovermode: "closest",
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, ...layout,
  };
  for (const name of Object.keys(whole).filter((key) => /^[xy]axis/.test(key))) {
    whole[name] = { automargin: true, gridcolor: "#8884", zerolinecolor: "#8886", ...whole[name] };
  }
  charts[id] = true;
  return Plotly.react(id, traces, whole, { responsive: true, displayModeBar: false });
}

function drawSpeeds() {
  const traces = [];
  for (const name of series) {
    const mine = shown().filter((row) => row.series === name && is(row.output_tokens_per_s) && is(row.user_tokens_per_s_mean));
    if (!mine.length) continue;
    const valid = mine.filter((row) => row.valid);
    const front = valid.filter((row) => row.pareto).sort((a, b) => a.user_tokens_per_s_mean - b.user_tokens_per_s_mean);
    const line = (points, more) => ({
      x: points.map((row) => row.user_tokens_per_s_mean), y: points.map((row) => row.output_tokens_per_s),
      legendgroup: name, ...more,
    });
    traces.push(line(front, { mode: "lines", line: { color: colour(name), width: 2 }, showlegend: false, hoverinfo: "skip" }));
    traces.push(line(valid, {
      name: plain(name), mode: "markers+text", text: valid.map((row) => row.load), textposition: "top right",
      marker: { color: colour(name), symbol: symbol(name), size: 10, opacity: valid.map((row) => (meets(row, slo()) ? 1 : 0.35)) },
      customdata: valid.map(hover), hovertemplate: "%{customdata}<extra></extra>",
      error_x: bars(valid, "user_tokens_per_s_mean", name), error_y: bars(valid, "output_tokens_per_s", name),
    }));
    const invalid = mine.filter((row) => !row.valid);
    if (invalid.length) {
      traces.push(line(invalid, {
        name: `${plain(name)}: invalid`, mode: "markers", marker: { color: colour(name), symbol: "x", size: 9, opacity: 0.75 },
        customdata: invalid.map(hover), hovertemplate: "%{customdata}<extra></extra>",
      }));
    }
    const roof = mine.filter((row) => is(row.roofline_tokens_per_s)).sort((a, b) => a.load_value - b.load_value);
    if (roof.length) {
      traces.push({
        x: roof.map((row) => row.roofline_user_tokens_per_s), y: roof.map((row) => row.roofline_tokens_per_s),
        name: `${plain(name)}: roofline`, mode: "lines+markers", marker: { size: 4, color: colour(name) },
        line: { color: colour(name), dash: "dash", width: 1 }, text: roof.map((row) => row.load),
        hovertemplate: "roofline at %{text}: %{y:.4g} tokens/s, %{x:.4g} for each user<extra></extra>",
      });
    }
  }
  const scale = byId("log").checked ? "log" : "linear";
  return draw("speeds", traces, {
    height: 500, xaxis: { title: { text: "tokens/s for each user (1 / mean ITL)" }, type: scale, rangemode: "tozero" },
    yaxis: { title: { text: "output tokens/s, all users" }, type: scale, rangemode: "tozero" },
  }, "No point of these lengths has both speeds.");
}

function bars(points, key, name) {
  if (!points.some((row) => is(row[`${key}_low`]))) return undefined;
  const away = (row, end) => (is(row[`${key}_${end}`]) ? Math.abs(row[`${key}_${end}`] - row[key]) : 0);
  return {
    type: "data", symmetric: false, thickness: 1, width: 3, color: colour(name),
    array: points.map((row) => away(row, "high")), arrayminus: points.map((row) => away(row, "low")),
  };
}

function drawLatency(metric) {
  const traces = [];
  for (const name of series) {
    const mine = ofKind().filter((row) => row.series === name && row.valid && is(row[`${metric}_p50_ms`]))
      .sort((a, b) => a.load_value - b.load_value);
    if (!mine.length) continue;
    const x = mine.map((row) => row.load_value);
    for (const [statistic, dash] of [["p50", "solid"], ["p99", "dot"]]) {
      const key = `${metric}_${statistic}_ms`;
      if (mine.some((row) => is(row[`${key}_low`]))) {
        const edge = (end) => ({
          x, y: mine.map((row) => row[`${key}_${end}`] ?? row[key]), mode: "lines", line: { width: 0, color: colour(name) },
          legendgroup: name, showlegend: false, hoverinfo: "skip",
        });
        traces.push(edge("low"), { ...edge("high"), fill: "tonexty", fillcolor: `${colour(name)}33` });
      }
      traces.push({
        x, y: mine.map((row) => row[key]), name: plain(name), legendgroup: name,
        showlegend: statistic === "p50", mode: "lines+markers", line: { color: colour(name), dash },
        marker: { symbol: symbol(name), size: statistic === "p50" ? 8 : 5 },
        customdata: mine.map(hover), hovertemplate: "%{customdata}<extra></extra>",
      });
    }
  }
  const kind = byId("kind").value;
  const loads = unique(ofKind().map((row) => row.load_value)).sort((a, b) => a - b);
  return draw(metric, traces, {
    xaxis: { title: { text: kind === "rate" ? "requests/s" : kind }, type: "log", tickvals: loads, ticktext: loads.map(String) },
    yaxis: { title: { text: `${metric.toUpperCase()}, ms` }, rangemode: "tozero", type: byId("log").checked ? "log" : "linear" },
  }, "No valid point of this load and these lengths has answers.");
}

function drawHeat() {
  const key = byId("heat-metric").value, osl = byId("heat-osl").value;
  const mine = rows.filter((row) => row.series === byId("heat-series").value && String(row.osl) === osl
    && row.load_kind === byId("kind").value && row.valid && is(row[key]));
  const x = unique(mine.map((row) => row.load_value)).sort((a, b) => a - b);
  const y = unique(mine.map((row) => row.isl)).sort((a, b) => a - b);
  const at = (isl, load) => mine.find((row) => row.isl === isl && row.load_value === load)?.[key] ?? null;
  const z = y.map((isl) => x.map((load) => at(isl, load)));
  const faster = !key.endsWith("_ms");
  return draw("heat", mine.length ? [{
    type: "heatmap", x: x.map(String), y: y.map(String), z, colorscale: "Viridis", reversescale: !faster, xgap: 2, ygap: 2,
    texttemplate: "%{z:.4g}", hovertemplate: `ISL %{y}, ${byId("kind").value} %{x}: %{z:.5g}<extra></extra>`,
    colorbar: { thickness: 12, tickfont: { size: 11 } },
  }] : [], {
    height: 140 + 56 * y.length, xaxis: { title: { text: byId("kind").value }, type: "category" },
    yaxis: { title: { text: "ISL" }, type: "category" },
  }, "No valid point of this engine, load and OSL.");
}

// The fastest point of each series under the bounds, best first; a point with errors is no answer.
function ranking() {
  const bounds = slo();
  const best = series.map((name) => shown()
    .filter((row) => row.series === name && row.valid && !row.num_errors && is(row.output_tokens_per_s) && meets(row, bounds))
    .sort((a, b) => b.output_tokens_per_s - a.output_tokens_per_s)[0]).filter(Boolean);
  return best.sort((a, b) => b.output_tokens_per_s - a.output_tokens_per_s);
}

function drawAccuracy() {
  const best = ranking().filter((row) => is(row.ppl_increase_percent));
  return draw("accuracy", best.map((row) => ({
    x: [row.ppl_increase_percent], y: [row.output_tokens_per_s], name: plain(row.series), mode: "markers+text",
    text: [row.load], textposition: "top center", marker: { color: colour(row.series), symbol: symbol(row.series), size: 13 },
    customdata: [`${hover(row)}<br>perplexity ${row.ppl_increase_percent >= 0 ? "+" : ""}${short(row.ppl_increase_percent)} %, KL ${short(row.mean_kl)}, `
      + `top-1 ${short(row.top1_percent)} %${row.accuracy_passed ? "" : ", gate failed"}`],
    hovertemplate: "%{customdata}<extra></extra>",
  })), {
    xaxis: { title: { text: "perplexity over the source's, % (less is better)" } },
    yaxis: { title: { text: "output tokens/s, best under the SLO" }, rangemode: "tozero" },
  }, "No engine here has a record of accuracy and a point that meets the bounds; `trtbuild verify NAME` makes a record.");
}

function drawTelemetry() {
  const held = DATA.telemetry[byId("telemetry-point").value];
  const groups = held ? unique(Object.keys(held.columns).map((name) => held.columns[name].group)) : [];
  const traces = [], layout = { height: 110 + 150 * groups.length, grid: { rows: groups.length, columns: 1, pattern: "independent", ygap: 0.12 }, hovermode: "x" };
  groups.forEach((group, index) => {
    const suffix = index ? String(index + 1) : "";
    layout[`yaxis${suffix}`] = { title: { text: group }, rangemode: "tozero" };
    layout[`xaxis${suffix}`] = { anchor: `y${suffix}`, matches: index ? "x" : undefined, showticklabels: index === groups.length - 1,
      title: index === groups.length - 1 ? { text: "seconds" } : undefined };
    for (const [name, column] of Object.entries(held.columns)) {
      if (column.group !== group) continue;
      traces.push({ x: held.time_s, y: column.values, name, mode: "lines", connectgaps: false, xaxis: `x${suffix}`,
        yaxis: `y${suffix}`, line: { width: 1.5, color: COLOURS[traces.length % COLOURS.length] } });
    }
  });
  return draw("telemetry", traces, layout, "No telemetry was kept beside these runs.");
}

function answer() {
  const best = ranking(), bounds = slo(), box = byId("answer");
  const asked = Object.entries(bounds).map(([name, bound]) => `${name.toUpperCase()} ${byId("statistic").value} ≤ ${bound} ms`);
  box.className = best.length ? "answer" : "answer none";
  box.textContent = best.length
    ? `${asked.length ? `Best with ${asked.join(", ")}` : "Fastest of all (no SLO given)"}: ${best[0].series} at ${best[0].load}, `
      + `${short(best[0].output_tokens_per_s)} output tokens/s.`
    : `Nothing measured at ${byId("lengths").value} meets ${asked.join(", ")} without errors.`;
  const cells = (row) => [row.series, row.load, short(row.output_tokens_per_s), short(row.user_tokens_per_s_mean),
    ...BOUNDS.map((name) => short(row[`${name}_${byId("statistic").value}_ms`])),
    is(row.ppl_increase_percent) ? `${row.ppl_increase_percent >= 0 ? "+" : ""}${short(row.ppl_increase_percent)}` : "not checked"];
  byId("ranking").replaceChildren(...best.map((row, index) => {
    const line = element("tr", null, index ? {} : { class: "best" });
    cells(row).forEach((cell, column) => line.append(element("td", cell ?? "", column > 1 ? { class: "number" } : {})));
    return line;
  }));
}

function drawAll() {
  answer();
  return Promise.all([drawSpeeds(), drawLatency("ttft"), drawLatency("itl"), drawHeat(), drawAccuracy()]);
}

function choices() {
  const most = (values) => unique(values).map((value) => [value, values.filter((other) => other === value).length])
    .sort((a, b) => b[1] - a[1])[0]?.[0];
  const options = (values) => unique(values).map((value) => [value, value]);
  const numeric = (values) => unique(values).sort((a, b) => a - b).map((value) => [String(value), String(value)]);
  fill(byId("lengths"), options([...rows].sort((a, b) => a.isl - b.isl || a.osl - b.osl).map(lengths)), most(rows.map(lengths)));
  fill(byId("kind"), options(rows.map((row) => row.load_kind)), most(rows.map((row) => row.load_kind)));
  fill(byId("heat-series"), options(series));
  fill(byId("heat-osl"), numeric(rows.map((row) => row.osl)));
  fill(byId("telemetry-point"), Object.entries(DATA.telemetry).map(([id, held]) => [id, held.label]));
  for (const [name, bound] of Object.entries(DATA.slo || {})) {
    const field = byId(`slo-${name.replace(/_s$/, "")}`);
    if (field) field.value = bound * 1000;
  }
  for (const id of ["lengths", "kind", "statistic", "log", ...BOUNDS.map((name) => `slo-${name}`)]) {
    byId(id).addEventListener("input", drawAll);
  }
  for (const id of ["heat-series", "heat-metric", "heat-osl"]) byId(id).addEventListener("input", drawHeat);
  byId("telemetry-point").addEventListener("input", drawTelemetry);
}

// `report.html#png` is what `perf report` opens to keep the charts as pictures.
async function pictures() {
  const found = {};
  for (const id of Object.keys(charts)) {
    const node = byId(id);
    await Plotly.relayout(node, { paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff" });
    found[id] = await Plotly.toImage(node, { format: "png", width: 1100, height: Math.max(460, node.layout.height), scale: 2 });
  }
  document.body.append(element("script", JSON.stringify(found), { id: "pictures", type: "application/json" }));
}

async function start() {
  choices();
  drawTable();
  await drawAll();
  await drawTelemetry();
  if (location.hash === "#png") await pictures();
  document.documentElement.dataset.ready = "yes";
}
