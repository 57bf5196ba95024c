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

export function postJson(path, body) {
  return call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { ...options, headers: { Accept: "application/json", ...options.headers } });
  } catch {
    throw new CallError(0, "Airflow's server cannot be reached.");
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok) return body;
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
  if (said && known && status !== 404) return new CallError(status, `${known} ${said}`);
  return new CallError(status, known || said || `Airflow answered with status ${status}.`);
}
