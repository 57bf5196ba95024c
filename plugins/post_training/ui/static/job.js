// One job: its state as it changes, curves, checkpoints, log, params, and what can be done with it.

import { ChartBoard } from "./charts.js";
import { byId, h, show } from "./dom.js";
import { bytes, duration, elapsed, number, shortName, time } from "./format.js";
import { getJson, postJson } from "./http.js";
import { airflow, outside } from "./links.js";
import { LogView, noLog } from "./log.js";
import { badge, confirmed, copyButton, notice, progressBar, table } from "./parts.js";
import { repeat } from "./poll.js";
import { loadSnippet } from "./snippet.js";

const WHILE_LIVE = 3;
const OTHERWISE = 30;

const jobUuid = new URLSearchParams(location.search).get("job_uuid") ?? "";
const board = new ChartBoard(byId("curves"));
let log = null;

async function refresh() {
  try {
    const job = await getJson("data/job", { job_uuid: jobUuid });
    showJob(job);
    const { jobs } = await getJson("data/curves", { jobs: jobUuid });
    board.update(jobs);
    showProblem(null);
    return isLive(job) ? WHILE_LIVE : OTHERWISE;
  } catch (error) {
    showProblem(error);
    if (!byId("summary").dataset.shown) byId("summary").replaceChildren();
    return error.status === 401 || error.status === 404 ? Infinity : OTHERWISE / 3;
  }
}

function showProblem(error) {
  show(byId("notice"), error?.message ?? null, () => (error ? notice(error.message) : null));
}

function showJob(job) {
  document.title = `${job.job_uuid} · Post-training`;
  byId("title").textContent = job.job_uuid;
  show(byId("badge"), job.status, () => badge(job.status));
  const rights = [job.may_cancel, job.may_retry, job.may_clone, job.mlflow_url];
  show(byId("actions"), rights, () => actions(job));
  const lasted = Math.round(elapsed(job.started_at, job.completed_at) ?? -1);
  show(byId("summary"), [job, lasted], () => summary(job, lasted));
  show(byId("checkpoints"), job.checkpoints, () => checkpoints(job));
  show(byId("params"), job.params, () => params(job));
  showLog(job);
}

/** Follow the log; anew where the job goes on after its log was complete. */
function showLog(job) {
  if (!job.may_read_logs) noLog(byId("log"));
  else if (!log || (log.ended && isLive(job))) log = new LogView(byId("log"), jobUuid, () => now());
}

function isLive(job) {
  return job.status === "in_progress" || job.status === "scheduled";
}

function actions(job) {
  const run = `dags/${encodeURIComponent(job.dag_id)}/runs/${encodeURIComponent(job.run_id)}`;
  return [
    airflow(run, "DAG run"),
    job.mlflow_url ? outside(job.mlflow_url, "MLflow run") : null,
    job.may_clone
      ? h("a", { class: "button", href: `new?${new URLSearchParams({ clone: job.job_uuid })}` }, "Clone")
      : null,
    job.may_retry ? h("button", { type: "button", onclick: (event) => retry(event, job) }, "Retry") : null,
    job.may_cancel
      ? h("button", { type: "button", class: "danger", onclick: (event) => cancel(event, job) }, "Cancel job")
      : null,
  ];
}

async function cancel({ target }, job) {
  const question = `Cancel ${job.job_uuid}? Its checkpoints so far are kept.`;
  if (!(await confirmed(question, "Cancel job"))) return;
  await attempt(target, () => postJson("../v1/post-training/job/cancel", { job_uuid: job.job_uuid }));
}

/** Clear the job's tasks by Airflow's own API: the same job goes on from its newest checkpoint. */
async function retry({ target }, job) {
  const path = `../../api/v2/dags/${encodeURIComponent(job.dag_id)}/clearTaskInstances`;
  const requested = job.job_uuid === job.run_id;
  await attempt(target, () =>
    postJson(path, {
      dry_run: false,
      dag_run_id: job.run_id,
      task_ids: job.retried,
      only_failed: job.blocked,
      include_upstream: job.blocked,
      include_downstream: !requested,
    }),
  );
}

/** Do what a button is for, once; what is said against it stays until the next try. */
async function attempt(button, call) {
  button.disabled = true;
  byId("refusal").replaceChildren();
  try {
    await call();
    now();
  } catch (error) {
    byId("refusal").replaceChildren(notice(error.message));
  } finally {
    button.disabled = false;
  }
}

function summary(job, lasted) {
  const memory = job.resources?.peak_device_memory_bytes ?? job.resources?.peak_memory_bytes;
  const estimate = job.metrics.estimated_memory_bytes;
  const facts = [
    ["Progress", progressBar(job)],
    ["Algorithm", job.algorithm ?? "–"],
    ["Model", h("span", { title: job.model ?? "" }, shortName(job.model))],
    ["Started", time(job.started_at)],
    ["Duration", lasted < 0 ? "–" : duration(lasted)],
    ["Attempt", String(job.attempt || "–")],
    ["Training loss", number(job.train_loss)],
    ["Validation loss", number(job.validation_loss)],
    ["Tokens", number(job.resources?.job_tokens ?? job.metrics.tokens_seen)],
    ["Device time", duration(job.resources?.device_seconds)],
    ["Peak memory", memory === undefined ? "–" : bytes(memory)],
    ["Expected memory", estimate === undefined ? "–" : bytes(estimate)],
  ];
  return [
    job.error ? notice(job.error) : null,
    job.warning ? notice(job.warning, "warning") : null,
    h(
      "dl",
      { class: "facts" },
      ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
    ),
  ];
}

function checkpoints(job) {
  if (!job.checkpoints.length) return h("p", { class: "muted" }, "There is no checkpoint yet.");
  const columns = ["Epoch", "Training loss", "Validation loss", "Perplexity", "Saved", "Files", "Load"];
  const rows = job.checkpoints.map((checkpoint) => {
    const metrics = checkpoint.training_metrics ?? {};
    const code = loadSnippet(checkpoint.path, job.mlflow_url);
    const load = h(
      "details",
      {},
      h("summary", {}, "Python"),
      h("div", { class: "code" }, copyButton(code), h("pre", {}, code)),
    );
    return [
      String(checkpoint.epoch),
      number(metrics.train_loss),
      number(metrics.validation_loss),
      number(metrics.perplexity),
      time(checkpoint.created_at),
      checkpoint.mlflow_url ? outside(checkpoint.mlflow_url, "MLflow") : checkpoint.path,
      load,
    ];
  });
  return table("Checkpoints, the oldest first", columns, rows);
}

function params(job) {
  const recorded = Object.entries(job.params);
  if (!recorded.length) return h("p", { class: "muted" }, "The request is not recorded.");
  const entries = recorded.map(([path, value]) =>
    h("div", {}, h("dt", {}, h("code", {}, path)), h("dd", {}, text(value))),
  );
  return h("dl", { class: "params" }, ...entries);
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value);
}

byId("title").textContent = jobUuid;
const now = repeat(refresh);
