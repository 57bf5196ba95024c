// One job: its state as it changes, curves, checkpoints, log, params, and what can be done with it.

import { ChartBoard } from "./charts.js";
import { arrange, byId, h, Kept, show } from "./dom.js";
import { bytes, duration, elapsed, modelName, number, time } from "./format.js";
import { getJson, postJson } from "./http.js";
import { airflow, outside } from "./links.js";
import { LogView, noLog } from "./log.js";
import { badge, confirmed, copyButton, notice, progressBar, row, table } from "./parts.js";
import { repeat } from "./poll.js";
import { loadSnippet } from "./snippet.js";

const WHILE_LIVE = 3;
const OTHERWISE = 30;

const jobUuid = new URLSearchParams(location.search).get("job_uuid") ?? "";
const board = new ChartBoard(byId("curves"));
const offers = new Kept(offer);
const saved = new Kept(checkpoint);
const COLUMNS = ["Epoch", "Training loss", "Validation loss", "Perplexity", "Saved", "Files", "Load"];
const checkpoints = table("Checkpoints, the oldest first", COLUMNS, []);
const noCheckpoint = h("p", { class: "muted" });
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
  arrange(byId("actions"), offers.of(actions(job)));
  const lasted = Math.round(elapsed(job.started_at, job.completed_at) ?? -1);
  show(byId("summary"), [job, lasted], () => summary(job, lasted));
  showCheckpoints(job);
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

/** What can be done with the job: of each its name, and what it needs to know. */
function actions({ dag_id, run_id, retried, blocked, ...job }) {
  return [
    ["DAG run", { dag_id, run_id }],
    job.mlflow_url ? ["MLflow run", job.mlflow_url] : null,
    job.may_clone ? ["Clone"] : null,
    job.may_retry ? ["Retry", { dag_id, run_id, retried, blocked }] : null,
    job.may_cancel ? ["Cancel job"] : null,
  ].filter(Boolean);
}

function offer([name, known]) {
  const make = {
    "DAG run": () => airflow(pathOf(known), name),
    "MLflow run": () => outside(known, name),
    Clone: () => h("a", { class: "button", href: `new?${new URLSearchParams({ clone: jobUuid })}` }, name),
    Retry: () => h("button", { type: "button", onclick: (event) => retry(event, known) }, name),
    "Cancel job": () => h("button", { type: "button", class: "danger", onclick: cancel }, name),
  };
  return make[name]();
}

function pathOf({ dag_id, run_id }) {
  return `dags/${encodeURIComponent(dag_id)}/runs/${encodeURIComponent(run_id)}`;
}

async function cancel({ target }) {
  const question = `Cancel ${jobUuid}? Its checkpoints so far are kept.`;
  if (!(await confirmed(question, "Cancel job"))) return;
  await attempt(target, () => postJson("../v1/post-training/job/cancel", { job_uuid: jobUuid }));
}

/** Clear the job's tasks by Airflow's own API: the same job goes on from its newest checkpoint. */
async function retry({ target }, job) {
  const path = `../../api/v2/dags/${encodeURIComponent(job.dag_id)}/clearTaskInstances`;
  const requested = jobUuid === job.run_id;
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
    ["Model", h("span", { title: job.model ?? "" }, modelName(job))],
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

function showCheckpoints(job) {
  if (!job.mlflow_url && saved.nodes.size) return; // MLflow does not answer now
  const items = job.checkpoints.map((each) => [each, loadSnippet(each.path, job.mlflow_url, job.params)]);
  arrange(checkpoints.querySelector("tbody"), saved.of(items));
  noCheckpoint.textContent = job.mlflow_url ? "There is no checkpoint yet." : "No checkpoint is known.";
  arrange(byId("checkpoints"), [items.length ? checkpoints : noCheckpoint]);
}

function checkpoint([{ epoch, created_at, path, mlflow_url, training_metrics }, code]) {
  const metrics = training_metrics ?? {};
  const text = h("pre", {}, code);
  const load = h("div", { class: "code" }, copyButton(text), text);
  return row([
    String(epoch),
    number(metrics.train_loss),
    number(metrics.validation_loss),
    number(metrics.perplexity),
    time(created_at),
    mlflow_url ? outside(mlflow_url, "MLflow") : path,
    h("details", {}, h("summary", {}, "Python"), load),
  ]);
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
