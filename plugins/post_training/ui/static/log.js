// A job's log as it grows, by the service's server-sent events.

import { h } from "./dom.js";
import { CallError, getJson } from "./http.js";
import { notice } from "./parts.js";

const PATH = "../v1/post-training/job/logs";
const MAX_LINES = 5000;
const AGAIN_SECONDS = 10;

/** Follows a job's log into an element; `onEnd` is called when the job has ended and its log is whole. */
export class LogView {
  constructor(element, jobUuid, onEnd) {
    this.jobUuid = jobUuid;
    this.onEnd = onEnd;
    this.offset = 0;
    this.batches = [];
    this.count = 0;
    this.ended = false;
    this.follow = h("input", { type: "checkbox", checked: true });
    this.state = h("span", { class: "muted", role: "status" });
    this.cut = h("p", { class: "muted", hidden: true }, `Only the last ${MAX_LINES} lines are shown here.`);
    this.lines = h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log" });
    const controls = h("label", { class: "inline" }, this.follow, "Scroll with new lines");
    element.replaceChildren(h("div", { class: "between" }, controls, this.state), this.cut, this.lines);
    // A browser has six connections to a host: those of tabs that nobody looks at would hold up Airflow.
    document.addEventListener("visibilitychange", () => this.connect());
    this.connect();
  }

  connect() {
    this.source?.close();
    if (this.ended || document.hidden) return;
    const query = new URLSearchParams({ job_uuid: this.jobUuid, offset: this.offset });
    const source = new EventSource(`${PATH}?${query}`);
    this.source = source;
    this.state.textContent = "Following";
    source.addEventListener("log", (event) => {
      this.offset = Number(event.lastEventId);
      this.add(JSON.parse(event.data).log_lines);
    });
    source.addEventListener("status", () => {
      source.close();
      this.ended = true;
      this.state.textContent = "The log is complete";
      this.onEnd();
    });
    source.addEventListener("error", () => {
      if (source.readyState === EventSource.CLOSED)
        this.failed(); // else the browser comes again by itself
      else this.state.textContent = "Connecting again…";
    });
    source.addEventListener("open", () => (this.state.textContent = "Following"));
  }

  async failed() {
    let error = new CallError(0, "The log's stream was cut.");
    await getJson(PATH, { job_uuid: this.jobUuid, limit: 1 }).catch((refused) => (error = refused));
    this.state.textContent = error.message;
    const lasting = error.status >= 400 && error.status < 500;
    if (!lasting) setTimeout(() => this.connect(), AGAIN_SECONDS * 1000);
  }

  add(lines) {
    const batch = document.createTextNode(`${lines.join("\n")}\n`);
    this.batches.push([batch, lines.length]);
    this.count += lines.length;
    this.lines.append(batch);
    while (this.count > MAX_LINES && this.batches.length > 1) {
      const [oldest, length] = this.batches.shift();
      oldest.remove();
      this.count -= length;
      this.cut.hidden = false;
    }
    if (this.follow.checked) this.lines.scrollTop = this.lines.scrollHeight;
  }
}

/** Say that the log may not be read, instead of following it. */
export function noLog(element) {
  element.replaceChildren(notice("Airflow does not allow you to read this job's log.", "warning"));
}
