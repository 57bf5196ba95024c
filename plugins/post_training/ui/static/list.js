// The list of jobs: filter, search, pages, and which of them to compare.

import { arrange, byId, show } from "./dom.js";
import { getJson } from "./http.js";
import { notice } from "./parts.js";
import { repeat } from "./poll.js";
import { JobTable } from "./rows.js";

const LIMIT = 25;
const WHILE_LIVE = 4;
const OTHERWISE = 15;
const MAX_COMPARED = 8; // as many as there are colors for their curves

const filters = byId("filters");
const state = { text: "", status: "", offset: 0, ...fromAddress() };
const table = new JobTable(offerToCompare);
let newest = 0;

function fromAddress() {
  const query = new URLSearchParams(location.search);
  const offset = Number.parseInt(query.get("offset") ?? "0", 10);
  return {
    text: query.get("text") ?? "",
    status: query.get("status") ?? "",
    offset: Number.isInteger(offset) && offset > 0 ? offset : 0,
  };
}

async function refresh() {
  newest += 1;
  const mine = newest;
  try {
    const page = await getJson("data/jobs", { ...state, limit: LIMIT });
    if (mine !== newest) return WHILE_LIVE; // a filter has changed since
    showPage(page);
    const live = page.jobs.some((job) => job.status === "in_progress" || job.status === "scheduled");
    return live && !state.text ? WHILE_LIVE : OTHERWISE; // a search reads all requests
  } catch (error) {
    say(error.message, "error");
    return error.status === 401 ? Infinity : OTHERWISE;
  }
}

function say(sentence, kind) {
  show(byId("notice"), sentence, () => (sentence ? notice(sentence, kind) : null));
}

function showPage(page) {
  say(page.notice, "warning");
  byId("new").hidden = !page.may_submit;
  table.update(page.jobs);
  const beyond = page.total > 0 ? "There are no jobs this far back." : "No job has been started yet.";
  const empty = page.total === 0 && (state.text || state.status) ? "No job matches this search." : beyond;
  arrange(byId("jobs"), [page.jobs.length ? table.element : notice(empty, "empty")]);
  const last = state.offset + page.jobs.length;
  const range = page.jobs.length ? `${state.offset + 1}–${last} of ${page.total.toLocaleString("en")}` : "";
  if (byId("range").textContent !== range) byId("range").textContent = range;
  byId("previous").disabled = state.offset === 0;
  byId("next").disabled = last >= page.total;
}

function offerToCompare(marked) {
  const link = byId("compare");
  const fits = marked.length >= 2 && marked.length <= MAX_COMPARED;
  const many = marked.length > MAX_COMPARED ? `, at most ${MAX_COMPARED}` : "";
  link.textContent = marked.length ? `Compare ${marked.length}${many}` : "Compare";
  link.setAttribute("aria-disabled", String(!fits));
  if (fits) link.href = `compare?${new URLSearchParams({ jobs: marked.join(",") })}`;
  else link.removeAttribute("href");
}

function change(changes) {
  Object.assign(state, changes);
  const said = Object.entries(state).filter(([, value]) => value);
  history.replaceState(null, "", `?${new URLSearchParams(said)}`);
  newest += 1;
  now();
}

function changeFilter() {
  change({ text: filters.elements.text.value.trim(), status: filters.elements.status.value, offset: 0 });
}

let typing = null;
filters.elements.text.value = state.text;
filters.elements.status.value = state.status;
filters.addEventListener("submit", (event) => {
  event.preventDefault();
  changeFilter();
});
filters.elements.status.addEventListener("change", changeFilter);
filters.elements.text.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(changeFilter, 250);
});
byId("previous").addEventListener("click", () => change({ offset: Math.max(0, state.offset - LIMIT) }));
byId("next").addEventListener("click", () => change({ offset: state.offset + LIMIT }));
const now = repeat(refresh);
