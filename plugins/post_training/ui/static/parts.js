// The small parts that several pages show.

import { h, svg } from "./dom.js";
import { duration, STATUS_NAMES } from "./format.js";

export function badge(status) {
  return h("span", { class: `badge ${status}` }, STATUS_NAMES[status] ?? status);
}

/** A bar with the share that is done and, beside it, the time that is left. */
export function progressBar(job) {
  if (job.progress === null || job.status === "scheduled") return h("span", { class: "muted" }, "–");
  const percent = Math.round(Math.min(1, Math.max(0, job.progress)) * 100);
  const left = job.seconds_left === null || percent === 100 ? "" : `${duration(job.seconds_left)} left`;
  return h(
    "span",
    { class: `progress ${job.status}` },
    h("progress", { max: 100, value: percent, "aria-label": `Progress of ${job.job_uuid}` }),
    h("span", { class: "percent" }, `${percent} %`),
    left ? h("span", { class: "muted" }, left) : null,
  );
}

/** A line of a few values, for the eye alone: the newest value stands beside it. */
export function sparkline(values, { width = 96, height = 24 } = {}) {
  if (values.length < 2) return null;
  const low = Math.min(...values);
  const span = Math.max(...values) - low || 1;
  const x = (index) => (1 + (index / (values.length - 1)) * (width - 2)).toFixed(1);
  const y = (value) => (height - 2 - ((value - low) / span) * (height - 4)).toFixed(1);
  const points = values.map((value, index) => `${x(index)},${y(value)}`).join(" ");
  const box = { viewBox: `0 0 ${width} ${height}`, width, height };
  return svg("svg", { class: "spark", "aria-hidden": "true", ...box }, svg("polyline", { points }));
}

/** One sentence that says what went wrong. */
export function notice(sentence, kind = "error") {
  return h("p", { class: `notice ${kind}` }, sentence);
}

/** A row of a table: its cells' nodes or texts. */
export function row(cells) {
  return h("tr", {}, ...cells.map((cell) => h("td", {}, cell)));
}

/** A table: its columns' names, and its rows. The caption is for those who hear it. */
export function table(caption, columns, rows) {
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, ...columns.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, ...rows),
    ),
  );
}

/** Ask before what cannot be taken back; Airflow's frame has no window.confirm. Resolves to the answer. */
export function confirmed(question, action) {
  return new Promise((resolve) => {
    const form = h(
      "form",
      { method: "dialog" },
      h("p", { id: "question" }, question),
      h(
        "div",
        { class: "actions" },
        h("button", { value: "no" }, "Keep it"),
        h("button", { value: "yes", class: "danger" }, action),
      ),
    );
    const dialog = h("dialog", { "aria-labelledby": "question" }, form);
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "yes");
      dialog.remove();
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** A button that copies an element's text, also where the address is plain HTTP and there is no clipboard. */
export function copyButton(source) {
  const button = h("button", { type: "button", class: "small" }, "Copy");
  button.addEventListener("click", async () => {
    const done = await copied(source);
    button.textContent = done ? "Copied" : "Press Ctrl-C";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

async function copied(source) {
  if (navigator.clipboard) {
    const written = await navigator.clipboard.writeText(source.textContent).then(
      () => true,
      () => false,
    );
    if (written) return true;
  }
  getSelection().selectAllChildren(source); // which moves no focus, and stays for who presses Ctrl-C
  return document.execCommand("copy");
}
