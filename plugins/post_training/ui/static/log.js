// A job's log as it grows, by the service's server-sent events.

import { h } from "./dom.js";
import { CallError, knock } from "./http.js";
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
    this.shown = [];
    this.text = document.createTextNode("");
    this.ended = false;
    this.follow = h("input", { type: "checkbox", checked: true });
    this.state = h("span", { class: "muted", role: "status" });
    this.cut = h("p", { class: "muted", hidden: true }, `Only the last ${MAX_LINES} lines are shown here.`);
    this.lines = h("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log" }, this.text);
    const controls = h("label", { class: "inline" }, this.follow, "Scroll with new lines");
    element.replaceChildren(h("div", { class: "between" }, controls, this.state), this.cut, this.lines);
    // A browser has six connections to a host: those of tabs that nobody looks at would hold up Airflow.
    document.addEventListener("visibilitychange", () => this.connect());
    this.connect();
  }

  connect() {
    this.source?.close();
    if (this.ended || document.hidden) return;
    const source = new EventSource(this.address);
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

  get address() {
    return `${PATH}?${new URLSearchParams({ job_uuid: this.jobUuid, offset: this.offset })}`;
  }

  async failed() {
    let error = new CallError(0, "The log's stream was cut.");
    await knock(this.address).catch((refused) => (error = refused));
    this.state.textContent = error.message;
    const lasting = error.status >= 400 && error.status < 500;
    if (!lasting) setTimeout(() => this.connect(), AGAIN_SECONDS * 1000);
  }

  add(lines) {
    this.shown.push(...lines);
    const old = this.shown.splice(0, Math.max(0, this.shown.length - MAX_LINES));
    if (old.length) this.cut.hidden = false;
    this.text.appendData(written(lines));
    this.text.deleteData(0, written(old).length);
    if (this.follow.checked) this.lines.scrollTop = this.lines.scrollHeight;
  }
}

function written(lines) {
  return lines.map((line) => `${line}\n`).join("");
}

/** Say that the log may not be read, instead of following it. */
export function noLog(element) {
  element.replaceChildren(notice("Airflow does not allow you to read this job's log.", "warning"));
}
