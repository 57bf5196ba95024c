// The tab of a DAG run: its one job, or those that it has.

import { arrange, byId, show } from "./dom.js";
import { getJson } from "./http.js";
import { notice } from "./parts.js";
import { repeat } from "./poll.js";
import { JobTable } from "./rows.js";

const query = new URLSearchParams(location.search);
const table = new JobTable();
const LIMIT = 100;

async function refresh() {
  try {
    const page = await getJson("data/jobs", {
      dag_id: query.get("dag_id") ?? "",
      run_id: query.get("run_id") ?? "",
      limit: LIMIT,
    });
    if (page.total === 1) {
      location.replace(`job?${new URLSearchParams({ job_uuid: page.jobs[0].job_uuid })}`);
      return Infinity;
    }
    const more =
      page.total > LIMIT ? `The newest ${LIMIT} of ${page.total} jobs of this run are shown.` : null;
    say([page.notice, more].filter(Boolean).join(" ") || null, "warning");
    table.update(page.jobs);
    const none = notice("This run has no post-training job.", "empty");
    arrange(byId("jobs"), [page.jobs.length ? table.element : none]);
    return 5;
  } catch (error) {
    say(error.message, "error");
    return error.status === 401 ? Infinity : 15;
  }
}

function say(sentence, kind) {
  show(byId("notice"), sentence, () => (sentence ? notice(sentence, kind) : null));
}

repeat(refresh);
