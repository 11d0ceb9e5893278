// The server as its metrics describe it, once a second while somebody looks.
import { html, useEffect, useState } from "../vendor/preact-htm.js";
import { healthy, metricsText, version } from "./api.js";
import { number, t } from "./i18n.js";
import { labelsOf, meanOf, parseMetrics } from "./metrics.js";
import { Icon } from "./parts.js";
import { changed, state } from "./store.js";

const PERIOD_MS = 1000;
const POINTS = 120;
const WINDOW_MS = 3500;
const PREFIX = "fastdeploy:";

const seen = { samples: null, failure: null, healthy: true, version: "", totals: [], history: [] };

const value = (name) => seen.samples?.get(PREFIX + name) ?? 0;

async function look() {
  seen.healthy = await healthy();
  try {
    seen.samples = parseMetrics(await metricsText());
    seen.failure = null;
    remember();
  } catch (error) {
    seen.failure = error;
    if (error.status === 401) state.keyAsked ??= "missing";
  }
  changed();
}

/** Rates over some seconds, from the differences of counters (the server's own are means over ten). The engine tells its
 * totals only now and then, so the difference of two looks at them may hold the tokens of much more or less than their distance. */
function remember() {
  const now = { time: performance.now(), generated: value("generation_tokens_total"), prompt: value("prompt_tokens_total") };
  const last = seen.totals.at(-1);
  if (last && (now.generated < last.generated || now.prompt < last.prompt)) seen.totals = []; // the server is a new one
  seen.totals.push(now);
  while (now.time - seen.totals[1]?.time >= WINDOW_MS) seen.totals.shift();
  const before = seen.totals[0];
  const seconds = (now.time - before.time) / 1000;
  if (seconds * 1000 < WINDOW_MS) return;
  seen.history.push({ generationRate: (now.generated - before.generated) / seconds, promptRate: (now.prompt - before.prompt) / seconds });
  seen.history.splice(0, seen.history.length - POINTS);
}

function Chart({ title, field }) {
  const values = seen.history.map((h) => h[field]);
  const latest = values.at(-1);
  const top = Math.max(...values, 1);
  const x = (i) => ((i + POINTS - values.length) / (POINTS - 1)) * 300;
  const y = (v) => 70 - (v / top) * 64;
  const line = values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  const area = values.length ? `${x(0).toFixed(1)},70 ${line} 300,70` : "";
  return html`<section class="card chart"><h3>${title}</h3>
    <p class="figure">${latest === undefined ? "–" : number(latest, latest < 100 ? 1 : 0)}</p>
    <svg viewBox="0 0 300 72" preserveAspectRatio="none" role="img" aria-label=${`${title}, ${t("lastMinutes")}`}>
      <polygon points=${area} /><polyline points=${line} /></svg>
    <p class="help">${t("lastMinutes")}, ${t("most", { value: number(Math.max(...values, 0)) })}</p></section>`;
}

const Figure = ({ title, text, sub, class: extra = "" }) => html`<section class=${`card ${extra}`}><h3>${title}</h3><p class="figure">${text}</p>
  <p class="help">${sub ?? ""}</p></section>`;

function Blocks() {
  const total = value("max_gpu_block_num");
  const available = value("available_gpu_block_num");
  const free = value("free_gpu_block_num");
  const used = total - available;
  const cached = available - free;
  const width = (part) => ({ width: `${total ? (part / total) * 100 : 0}%` });
  const text = t("kvText", { used: number(used), cached: number(cached), free: number(free), total: number(total) });
  return html`<section class="card wide"><h3>${t("kv")}</h3>
    <div class="blocks" role="img" aria-label=${text}><i class="used" style=${width(used)}></i><i class="cached" style=${width(cached)}></i></div>
    <p class="help legend">${text}</p></section>`;
}

const seconds = (mean) => {
  if (mean === null) return "–";
  return mean < 1 ? `${number(mean * 1000, mean < 0.01 ? 1 : 0)} ms` : `${number(mean, 2)} s`;
};

function Totals() {
  const rows = [
    ["requests", "requests_number_total"], ["completed", "request_success_total"],
    ["promptTokens", "prompt_tokens_total"], ["genTokens", "generation_tokens_total"],
    ["preempted", "request_preempted_total"], ["steps", "engine_steps_total"],
  ];
  return html`<section class="card"><h3>${t("totals")}</h3><dl class="facts">${rows.map(([label, name]) =>
    html`<dt>${t(label)}</dt><dd>${number(value(name))}</dd>`)}</dl></section>`;
}

function Facts() {
  const cache = labelsOf(seen.samples, `${PREFIX}cache_config_info`);
  const rows = [
    ["modelName", state.model?.id], ["version", seen.version],
    ["contextLength", state.model?.max_model_len && t("blockTokens", { count: number(state.model.max_model_len) })],
    ["batch", number(value("max_batch_size"))],
    ["blockSize", cache.block_size && t("blockTokens", { count: cache.block_size })],
  ].filter(([, text]) => text);
  return html`<section class="card"><h3>${t("details")}</h3><dl class="facts">${rows.map(([label, text]) =>
    html`<dt>${t(label)}</dt><dd>${text}</dd>`)}</dl></section>`;
}

const Empty = ({ icon, title, text }) => html`<div class="empty-state"><${Icon} name=${icon} /><h2>${title}</h2><p>${text}</p></div>`;

export function Server() {
  const [, renew] = useState(0);
  useEffect(() => {
    let timer;
    let gone = false;
    const tick = async () => {
      if (!document.hidden) await look();
      renew((n) => n + 1);
      if (!gone) timer = setTimeout(tick, PERIOD_MS);
    };
    version().then((v) => { seen.version = v.version; }).catch(() => {});
    tick();
    return () => { gone = true; clearTimeout(timer); };
  }, []);
  if (seen.failure?.status === 404) {
    return html`<main class="server"><${Empty} icon="activity" title=${t("noMetrics")} text=${t("noMetricsText")} /></main>`;
  }
  if (!seen.samples) {
    return html`<main class="server">${seen.failure && html`<${Empty} icon="circle-alert" title=${t("failed")}
      text=${seen.failure.status ? seen.failure.message : t("offline")} />`}</main>`;
  }
  const hits = value("hit_token_rate");
  return html`<main class="server"><div class="server-grid">
    <div class="server-head"><span class=${`health ${seen.healthy ? "good" : "bad"}`}>${seen.healthy ? t("healthy") : t("unhealthy")}</span>
      ${!value("requests_number_total") && html`<span class="help">${t("noTraffic")}</span>`}</div>
    <${Figure} title=${t("running")} text=${number(value("num_requests_running"))} />
    <${Figure} title=${t("waitingReq")} text=${number(value("num_requests_waiting"))} sub=${value("num_requests_preempted") ? `${t("preempted")}: ${number(value("num_requests_preempted"))}` : ""} />
    <${Figure} title=${t("hitRate")} text=${`${number(hits * 100, 1)} %`} sub=${t("hitText")} />
    <${Figure} title=${t("meanTtft")} text=${seconds(meanOf(seen.samples, `${PREFIX}time_to_first_token_seconds`))} sub=${t("mean")} />
    <${Figure} class="last" title=${t("meanTpot")} text=${seconds(meanOf(seen.samples, `${PREFIX}time_per_output_token_seconds`))} sub=${t("mean")} />
    <${Chart} title=${t("genRate")} field="generationRate" />
    <${Chart} title=${t("promptRate")} field="promptRate" />
    <${Blocks} />
    <${Totals} /><${Facts} />
  </div></main>`;
}
