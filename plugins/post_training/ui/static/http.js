// The page's calls. Addresses are relative: Airflow may be served below any path. Its cookie says who calls.

const SENTENCES = {
  401: "You are not logged in to Airflow any more: reload the page and log in.",
  403: "Airflow does not allow you to do this.",
  404: "There is no such job, or you may not see it.",
  413: "The request is larger than this deployment accepts.",
  503: "Airflow or MLflow does not answer at the moment.",
};

/** A call that failed: its status, one sentence, and the broken rules of an invalid request. */
export class CallError extends Error {
  constructor(status, sentence, errors = []) {
    super(sentence);
    this.status = status;
    this.errors = errors;
  }
}

export function getJson(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null);
  const text = new URLSearchParams(given).toString();
  return call(text ? `${path}?${text}` : path);
}

/** Ask for a stream of events, and leave it at once: an EventSource does not say why it is refused. */
export async function knock(address) {
  const leaving = new AbortController();
  await ask(address, { headers: { Accept: "text/event-stream" }, signal: leaving.signal });
  leaving.abort();
}

export function postJson(path, body) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

async function call(path, options = {}) {
  const answer = await ask(path, options);
  return answer.json().catch(() => null);
}

/** Return an answer; throw one that is none, or a refusal. */
async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { Accept: "application/json", ...options.headers } });
  } catch {
    throw new CallError(0, "Airflow's server cannot be reached.");
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw failure(answer.status, body?.detail);
}

function failure(status, detail) {
  const known = SENTENCES[status];
  if (Array.isArray(detail?.errors)) {
    const rules = detail.errors.map((error) => `${error.loc.join(".")}: ${error.msg}`).join("; ");
    return new CallError(status, rules, detail.errors);
  }
  const said = typeof detail === "string" ? `${detail[0].toUpperCase()}${detail.slice(1)}.` : "";
  if (status === 401) return new CallError(status, known);
  if (status === 503 && said) return new CallError(status, said); // of a full house, too
  if (said && known && status !== 404) return new CallError(status, `${known} ${said}`);
  return new CallError(status, known || said || `Airflow answered with status ${status}.`);
}
