// The page of the server: one image in, its labels and stage timings out, and the server's pulse.

import { $, element, milliseconds, sentKey } from "./common.js";
import { setUpCamera } from "./camera.js";
import { setUpShadows } from "./shadows.js";

const STAGES = ["decode", "queue", "inference"];
const SECONDS = 180; // how far back the chart goes
const DRIFT = [{ from: 0, word: "alike" }, { from: 0.1, word: "changing" }, { from: 0.25, word: "other images" }];
const WINDOW_S = 5; // over which a point's percentiles are taken

const state = { image: null, name: "", samples: [], last: null };

// --- theme ---------------------------------------------------------------------------------------

const systemDark = matchMedia("(prefers-color-scheme: dark)");
function applyTheme() {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? (systemDark.matches ? "dark" : "light");
}
systemDark.addEventListener("change", applyTheme);
$("theme").addEventListener("click", () => {
  localStorage.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  applyTheme();
});
applyTheme();

// --- talking to the server -----------------------------------------------------------------------

async function problemOf(response) {
  const text = await response.text();
  try {
    const problem = JSON.parse(text);
    return `${problem.title}: ${problem.detail}`;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

function withKey(options) {
  const bytes = sentKey(); // a header's characters are bytes
  return bytes ? { ...options, headers: { "X-API-Key": String.fromCharCode(...bytes) } } : options;
}

/** Whether the person at the page gave a key. */
function askForKey() {
  const key = prompt("The server asks for its API key:");
  if (key) sessionStorage.setItem("key", key);
  return Boolean(key);
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, withKey(options));
  } catch {
    throw new Error("The server does not answer.");
  }
  if (response.status === 401 && askForKey()) return ask(path, options);
  if (!response.ok) throw new Error(await problemOf(response));
  return response.json();
}

function predictQuery() {
  return new URLSearchParams($("engine").value ? { engine: $("engine").value } : {});
}

function predictRequest() {
  const body = new FormData(); // a form, because only the server judges what the bytes are
  body.append("file", state.image, state.name);
  return [`predict?${predictQuery()}`, { method: "POST", body }];
}

// --- engines -------------------------------------------------------------------------------------

async function listEngines() {
  const { engines } = await ask("engines");
  const usable = engines.filter((engine) => engine.state !== "refused");
  const chosen = $("engine").value;
  $("engine").replaceChildren(
    ...usable.map((engine) => {
      const notes = [engine.default && "default", engine.state === "available" && "not loaded"].filter(Boolean);
      const option = new Option(engine.name + (notes.length ? ` (${notes.join(", ")})` : ""), engine.name);
      option.dataset.state = engine.state;
      option.dataset.side = Math.min(engine.height, engine.width);
      option.selected = chosen ? engine.name === chosen : engine.default;
      return option;
    }),
  );
  $("engine").disabled = usable.length === 0;
}

$("engine").addEventListener("change", async () => {
  hideError();
  const option = $("engine").selectedOptions[0];
  try {
    if (option.dataset.state === "available") {
      await ask(`engines/${encodeURIComponent(option.value)}/load`, { method: "POST" });
      await listEngines();
    }
    if (!camera.reopen()) await predict();
  } catch (error) {
    showError(error.message);
  }
});

// --- choosing an image ---------------------------------------------------------------------------

function choose(file, name) {
  if (!file) return;
  camera.close();
  state.image = file;
  state.name = name ?? file.name ?? "image";
  const preview = $("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  preview.alt = `The chosen image, ${state.name}`;
  preview.hidden = false;
  preview.onload = () => preview.classList.toggle("small", preview.naturalWidth < 128);
  preview.onerror = () => { preview.hidden = true; $("invitation").hidden = false; };
  $("invitation").hidden = true;
  $("filename").textContent = `${state.name}, ${file.size < 10_000 ? `${file.size} bytes` : `${(file.size / 1000).toFixed(0)} kB`}`;
  $("again").disabled = false;
  predict();
}

$("file").addEventListener("change", () => { choose($("file").files[0]); $("file").value = ""; });
$("again").addEventListener("click", () => predict());
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); $("drop").classList.remove("over"); });
}
document.addEventListener("drop", (event) => choose(event.dataTransfer.files[0]));
document.addEventListener("paste", (event) => {
  const item = [...event.clipboardData.items].find((item) => item.type.startsWith("image/"));
  if (item) choose(item.getAsFile(), "pasted image");
});

// --- camera --------------------------------------------------------------------------------------

const camera = setUpCamera({ askForKey, choose, hideError, query: predictQuery, show, showError, sideOf });

/** The shorter side of the engine's input, pixels. */
function sideOf() {
  return Number($("engine").selectedOptions[0]?.dataset.side) || 0;
}

// --- the answer ----------------------------------------------------------------------------------

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  $("labels").replaceChildren();
  $("nothing").hidden = $("timing").hidden = true;
  $("answered-by").textContent = "";
}
function hideError() {
  $("error").hidden = true;
}

async function predict() {
  if (!state.image) return;
  hideError();
  try {
    show(await ask(...predictRequest()));
  } catch (error) {
    showError(error.message);
  }
}

function show({ engine, results: [result] }) {
  $("nothing").hidden = true;
  $("timing").hidden = false;
  $("answered-by").textContent = `${engine.name} · ${engine.precision} · ${engine.backend}${engine.activation === "sigmoid" ? " · several labels may be true" : ""}`;
  $("labels").replaceChildren(
    ...result.predictions.map(({ label, probability }) => {
      const fill = element("i");
      fill.style.width = `${(probability * 100).toFixed(2)}%`;
      return element(
        "li", {},
        element("span", { className: "name", textContent: label, title: label }),
        element("span", { textContent: `${(probability * 100).toFixed(1)} %` }),
        element("span", { className: "bar", ariaHidden: "true" }, fill),
      );
    }),
  );
  const latency = result.latency_ms;
  const rest = Math.max(0, latency.total - STAGES.reduce((sum, stage) => sum + latency[stage], 0));
  const parts = [...STAGES.map((stage) => [stage, latency[stage]]), ["rest", rest]];
  $("total").textContent = milliseconds(latency.total);
  $("stages").replaceChildren(
    ...parts.map(([stage, value]) => {
      const part = element("i");
      part.style.flexGrow = value;
      part.style.background = `var(--${stage})`;
      return part;
    }),
  );
  $("stages").ariaLabel = parts.map(([stage, value]) => `${stage} ${milliseconds(value)}`).join(", ");
  $("legend").replaceChildren(
    ...parts.map(([stage, value]) => {
      const item = element("li", {}, stage, element("b", { textContent: milliseconds(value) }));
      item.style.setProperty("--colour", `var(--${stage})`);
      return item;
    }),
  );
  $("rode").textContent = result.cached ? "It was answered from the cache."
    : result.batch_size === 1 ? "It rode alone." : `It rode in a batch of ${result.batch_size}.`;
}

// --- shadows -------------------------------------------------------------------------------------

const showShadows = setUpShadows({ ask, listEngines });

// --- the pulse -----------------------------------------------------------------------------------

async function pulse() {
  const status = $("status");
  try {
    const [stats, ready] = await Promise.all([ask(`stats?window_s=${WINDOW_S}`), fetch("health/ready")]);
    status.textContent = ready.ok ? "ready" : "not ready";
    status.className = `pill ${ready.ok ? "good" : "bad"}`;
    if ($("engine").disabled && ready.ok) await listEngines();
    sample(stats);
    showShadows(stats.engines);
  } catch {
    status.textContent = "no answer";
    status.className = "pill bad";
  }
  drawChart();
}

function sample({ engines, default: main, cache }) {
  const name = $("engine").value || main;
  const engine = engines.find((each) => each.engine === name && each.loaded);
  if (!engine) return;
  const now = performance.now() / 1000;
  const { hits, misses } = engine.cache;
  const images = engine.since_start.images + hits;
  const last = state.last?.engine === name && state.last.images <= images ? state.last : null;
  const rate = last ? (images - last.images) / (now - last.time) : 0;
  state.last = { engine: name, images, time: now };
  const { p50, p99 } = engine.recent.latency_ms.total;
  state.samples.push({ time: now, p50, p99, rate });
  while (state.samples[0].time < now - SECONDS) state.samples.shift();
  $("p50").textContent = milliseconds(p50);
  $("p99").textContent = milliseconds(p99);
  $("rate").textContent = `${rate.toFixed(rate < 10 ? 1 : 0)} /s`;
  $("batch").textContent = engine.mean_batch_size?.toFixed(1) ?? "–";
  $("pending").textContent = engine.pending;
  showFigure("cached", cache && hits + misses > 0, () => `${((100 * hits) / (hits + misses)).toFixed(0)} %`);
  const drift = Math.max(...Object.values(engine.predictions?.drift ?? {}));
  const grade = DRIFT.findLast(({ from }) => drift >= from);
  showFigure("drift", grade, () => `${drift.toFixed(2)}, ${grade.word}`);
  $("drift").classList.toggle("drifted", grade === DRIFT.at(-1));
}

function showFigure(id, shown, text) {
  $(id).hidden = !shown;
  if (shown) $(id).querySelector("dd").textContent = text();
}

/** The least of 1, 2 and 5 times a power of ten that is not below `value`. */
function niceCeiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}

function drawChart() {
  const chart = $("chart");
  const { width, height } = chart.getBoundingClientRect();
  if (!width) return;
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const left = 56, gap = 26, now = performance.now() / 1000;
  const age = state.samples.length ? now - state.samples[0].time : 0;
  const span = Math.min(SECONDS, Math.max(60, Math.ceil(age / 30) * 30)); // it grows with what there is to show
  const x = (time) => left + (width - left) * (1 - (now - time) / span);
  const panels = [
    { top: 8, bottom: height * 0.58, lines: ["p99", "p50"], unit: "ms" },
    { top: height * 0.58 + gap, bottom: height - 18, lines: ["rate"], unit: "/s" },
  ];
  const parts = [];
  for (const { top, bottom, lines, unit } of panels) {
    const values = state.samples.flatMap((each) => lines.map((line) => each[line] ?? 0));
    const ceiling = niceCeiling(Math.max(1, ...values));
    const y = (value) => bottom - ((bottom - top) * value) / ceiling;
    for (const value of [0, ceiling / 2, ceiling]) {
      parts.push(`<line class="grid" x1="${left}" x2="${width}" y1="${y(value)}" y2="${y(value)}"/>`);
      parts.push(`<text x="${left - 8}" y="${y(value) + 4}" text-anchor="end">${value} ${unit}</text>`);
    }
    for (const line of lines) {
      let path = "", pen = "M";
      for (const each of state.samples) {
        if (each[line] == null) { pen = "M"; continue; } // nothing was answered then: a gap, not a zero
        path += `${pen}${x(each.time).toFixed(1)} ${y(each[line]).toFixed(1)}`;
        pen = "L";
      }
      if (line === "rate" && path) {
        const first = x(state.samples[0].time), end = x(state.samples.at(-1).time);
        parts.push(`<path class="area" d="${path}L${end} ${bottom}L${first} ${bottom}Z"/>`);
      }
      parts.push(`<path class="${line}" d="${path}"/>`);
    }
  }
  for (const ago of [span, span / 2, 0]) {
    const anchor = ago === span ? "start" : ago === 0 ? "end" : "middle";
    parts.push(`<text x="${x(now - ago)}" y="${height - 3}" text-anchor="${anchor}">${ago ? `${ago} s ago` : "now"}</text>`);
  }
  chart.innerHTML = parts.join(""); // numbers and constants only
  chart.ariaLabel = `Latency and throughput over the last three minutes; now: median ${$("p50").textContent}, ` +
    `99th percentile ${$("p99").textContent}, throughput ${$("rate").textContent}`;
}

// --- load ----------------------------------------------------------------------------------------

const quantile = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];

$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!state.image) {
    $("load-result").textContent = "Choose an image first.";
    return;
  }
  const count = $("count").valueAsNumber, concurrency = Math.min($("concurrency").valueAsNumber, count);
  const [url, options] = predictRequest();
  const times = [];
  const outcomes = new Map();
  let sent = 0;
  $("send").disabled = true;
  Object.assign($("progress"), { max: count, value: 0, hidden: false });
  $("load-result").textContent = "";
  const began = performance.now();
  async function connection() {
    while (sent++ < count) {
      const start = performance.now();
      let outcome = "no answer";
      try {
        const response = await fetch(url, withKey(options));
        await response.arrayBuffer();
        outcome = response.status;
        if (response.ok) times.push(performance.now() - start);
      } catch { /* counted as no answer */ }
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1);
      $("progress").value++;
    }
  }
  await Promise.all(Array.from({ length: concurrency }, connection));
  const seconds = (performance.now() - began) / 1000;
  times.sort((a, b) => a - b);
  const failures = [...outcomes].filter(([outcome]) => outcome !== 200).map(([outcome, n]) => `${n} × ${outcome}`);
  $("load-result").textContent =
    `${times.length} answered in ${seconds.toFixed(1)} s: ${(times.length / seconds).toFixed(0)} a second` +
    (times.length ? `, median ${milliseconds(quantile(times, 0.5))}, 99th percentile ${milliseconds(quantile(times, 0.99))}` : "") +
    (failures.length ? `. Not answered: ${failures.join(", ")}.` : ".");
  $("send").disabled = false;
  $("progress").hidden = true;
});

// --- start ---------------------------------------------------------------------------------------

addEventListener("resize", drawChart);
listEngines().catch(() => {}).then(pulse);
setInterval(() => { if (!document.hidden) pulse(); }, 1000);
