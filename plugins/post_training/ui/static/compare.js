// Several jobs: their curves over each other, and the params in which they differ.

import { ChartBoard } from "./charts.js";
import { byId, h, show } from "./dom.js";
import { duration, elapsed, number } from "./format.js";
import { getJson } from "./http.js";
import { badge, notice, row, table } from "./parts.js";
import { repeat } from "./poll.js";

const named = (new URLSearchParams(location.search).get("jobs") ?? "").split(",").filter(Boolean);
const wanted = [...new Set(named)];
const known = new Map(); // the last answer of each
const board = new ChartBoard(byId("curves"));

async function refresh() {
  const answers = await Promise.allSettled(wanted.map((job_uuid) => getJson("data/job", { job_uuid })));
  const problems = [];
  answers.forEach(({ value, reason }, place) => {
    if (reason) problems.push([wanted[place], reason]);
    else known.set(wanted[place], value);
  });
  const jobs = wanted.flatMap((job_uuid) => known.get(job_uuid) ?? []);
  show(byId("jobs"), jobs, () => (jobs.length ? overview(jobs) : null));
  show(
    byId("params"),
    jobs.map((job) => job.params),
    () => (jobs.length ? differences(jobs) : null),
  );
  const ids = jobs.map((job) => job.job_uuid);
  if (ids.length) {
    await getJson("data/curves", { jobs: ids.join(",") }).then(
      (curves) => board.update(curves.jobs),
      (error) => problems.push(["Curves", error]),
    );
  }
  const sentence = problems.map(([name, error]) => `${name}: ${error.message}`).join(" ");
  show(byId("notice"), sentence, () => (sentence ? notice(sentence) : null));
  if (problems.some(([, error]) => error.status === 401)) return Infinity;
  if (problems.some(([, error]) => error.status !== 404)) return 15;
  if (!jobs.length) return Infinity;
  return jobs.some((job) => job.status === "in_progress" || job.status === "scheduled") ? 5 : 60;
}

function overview(jobs) {
  const columns = ["Job", "Status", "Algorithm", "Training loss", "Validation loss", "Tokens", "Duration"];
  const rows = jobs.map((job, index) =>
    row([
      h("span", { class: "name" }, h("span", { class: `swatch series-${index}` }), nameOf(job)),
      badge(job.status),
      job.algorithm ?? "–",
      number(job.train_loss),
      number(job.validation_loss),
      number(job.resources?.job_tokens ?? job.metrics.tokens_seen),
      duration(elapsed(job.started_at, job.completed_at)),
    ]),
  );
  return table("The compared jobs", columns, rows);
}

function nameOf(job) {
  return h("a", { href: `job?${new URLSearchParams({ job_uuid: job.job_uuid })}` }, job.job_uuid);
}

function differences(jobs) {
  const shown = jobs.map((job) =>
    Object.fromEntries(Object.entries(job.params).map(([path, value]) => [path, String(value)])),
  );
  const paths = [...new Set(shown.flatMap(Object.keys))].sort();
  const differing = paths.filter((path) => new Set(shown.map((params) => params[path])).size > 1);
  if (!differing.length) return h("p", { class: "muted" }, "These jobs have the same params.");
  const rows = differing.map((path) =>
    row([h("code", {}, path), ...shown.map((params) => params[path] ?? "–")]),
  );
  return table("Params that differ", ["Field", ...jobs.map((job) => job.job_uuid)], rows);
}

if (wanted.length) repeat(refresh);
else {
  byId("jobs").replaceChildren();
  byId("notice").replaceChildren(notice("No job is named: mark some in the list and choose Compare."));
}
