// The table of jobs. Rows stay what they are while their cells change: focus and marks are kept.

import { arrange, h, show } from "./dom.js";
import { duration, elapsed, modelName, number, time } from "./format.js";
import { badge, progressBar, sparkline } from "./parts.js";

const COLUMNS = ["Job", "Status", "Progress", "Training loss", "Algorithm", "Model", "Started", "Duration"];

export class JobTable {
  /** @param {((marked: string[]) => void) | null} onMark is told which jobs are marked; null: none can be. */
  constructor(onMark = null) {
    this.rows = new Map();
    this.marked = new Set();
    this.onMark = onMark;
    this.body = h("tbody");
    const mark = onMark ? [h("th", { scope: "col" }, h("span", { class: "hidden" }, "Compare"))] : [];
    this.element = h(
      "table",
      { class: "jobs" },
      h("caption", { class: "hidden" }, "Jobs, the newest first"),
      h("thead", {}, h("tr", {}, ...mark, ...COLUMNS.map((name) => h("th", { scope: "col" }, name)))),
      this.body,
    );
  }

  update(jobs) {
    const rows = jobs.map((job) => {
      const row = this.rows.get(job.job_uuid) ?? this.row(job);
      this.fill(row, job);
      return [job.job_uuid, row];
    });
    this.rows = new Map(rows);
    arrange(
      this.body,
      rows.map(([, row]) => row),
    );
  }

  row(job) {
    const cells = COLUMNS.map((name) => h("td", { "data-label": name }));
    cells[0].append(...jobName(job));
    return h(
      "tr",
      {},
      ...(this.onMark ? [h("td", { class: "mark" }, this.mark(job.job_uuid))] : []),
      ...cells,
    );
  }

  mark(jobUuid) {
    const box = h("input", { type: "checkbox", "aria-label": `Compare ${jobUuid}` });
    box.checked = this.marked.has(jobUuid);
    box.addEventListener("change", () => {
      if (box.checked) this.marked.add(jobUuid);
      else this.marked.delete(jobUuid);
      this.onMark([...this.marked]);
    });
    return box;
  }

  fill(row, job) {
    const [status, progress, loss, algorithm, model, started, took] = [...row.children].slice(
      this.onMark ? 2 : 1,
    );
    const lasted = elapsed(job.started_at, job.status === "in_progress" ? null : job.completed_at);
    show(status, job.status, () => badge(job.status));
    show(progress, [job.status, job.progress, job.seconds_left], () => progressBar(job));
    show(loss, [job.sparkline, job.train_loss], () => [
      sparkline(job.sparkline),
      h("span", { class: "value" }, number(job.train_loss)),
    ]);
    show(algorithm, job.algorithm, () => job.algorithm ?? "–");
    show(model, [job.model, job.algorithm], () => h("span", { title: job.model ?? "" }, modelName(job)));
    show(started, job.started_at, () => time(job.started_at));
    show(took, Math.round(lasted ?? -1), () => duration(lasted));
  }
}

function jobName(job) {
  const link = h("a", { href: `job?${new URLSearchParams({ job_uuid: job.job_uuid })}` }, job.job_uuid);
  const requested = job.job_uuid === job.run_id;
  return requested ? [link] : [link, h("span", { class: "muted block" }, `DAG ${job.dag_id}`)];
}
