// The form that submits. Its fields come from the service, and so do all rules: what it refuses is told
// beside the field that it names.

import { byId, h } from "./dom.js";
import { Field } from "./fields.js";
import { getJson, postJson } from "./http.js";
import { notice } from "./parts.js";

const OPEN = {
  supervised_fine_tune: ["Model", "Data", "Algorithm", "Training"],
  preference_optimize: ["Model", "Data", "Algorithm", "Adapters", "Training"],
};
const clone = new URLSearchParams(location.search).get("clone");
const form = byId("form");
let method = null;
let fields = [];
let jobUuid = null;
const typed = new Map(); // what was changed, by path: another method's field of that path takes it

async function start() {
  if (clone) byId("title").textContent = `Clone ${clone}`;
  try {
    const forms = await getJson("data/forms", clone ? { clone } : {});
    choose(forms, forms[0]);
  } catch (error) {
    form.replaceChildren();
    byId("notice").replaceChildren(notice(error.message));
  }
}

function choose(forms, chosen) {
  keepWhatIsTyped();
  method = chosen.method;
  fields = chosen.fields.map((field) => new Field(field, showWhatFits));
  jobUuid = idField();
  for (const field of [jobUuid, ...fields]) if (typed.has(field.path)) field.take(typed.get(field.path));
  const button = h("button", { type: "submit", class: "primary" }, "Start job");
  const bar = h(
    "div",
    { class: "submit" },
    button,
    h("a", { class: "button", href: "./" }, "Back to the jobs"),
  );
  form.replaceChildren(...methods(forms, chosen), jobUuid.element, ...sections(chosen), bar);
  showWhatFits();
}

function keepWhatIsTyped() {
  for (const field of jobUuid ? [jobUuid, ...fields] : []) {
    if (field.changed) typed.set(field.path, field);
    else typed.delete(field.path);
  }
}

function methods(forms, chosen) {
  if (forms.length < 2) return [];
  const options = forms.map((each) => {
    const box = h("input", { type: "radio", name: "method", checked: each === chosen });
    box.addEventListener("change", () => {
      choose(forms, each);
      form.querySelector("input[type=radio]:checked").focus();
    });
    return h("label", { class: "inline" }, box, each.title);
  });
  return [h("fieldset", { class: "methods" }, h("legend", {}, "Method"), ...options)];
}

function idField() {
  const moment = new Date().toISOString().replace(/[-:T]/g, "").slice(2, 12);
  const random = Math.random().toString(36).slice(2, 6);
  return new Field(
    {
      path: "job_uuid",
      json_schema: {
        type: "string",
        title: "job_uuid",
        description: "The job's id, also its Airflow run id.",
      },
      value: `${method === "preference_optimize" ? "dpo" : "sft"}-${moment}-${random}`,
      required: true,
    },
    () => {},
  );
}

function sections(chosen) {
  const names = [...new Set(chosen.fields.map((field) => field.section))];
  return names.map((name) => {
    const inside = fields.filter((field) => field.field.section === name);
    const grid = h("div", { class: "fields" }, ...inside.map((field) => field.element));
    return h(
      "details",
      { open: OPEN[method]?.includes(name), "data-section": name },
      h("summary", {}, name),
      grid,
    );
  });
}

/** Show the fields of the chosen types alone. */
function showWhatFits() {
  for (const field of fields) field.show(fits(field));
  for (const section of form.querySelectorAll("details[data-section]")) {
    section.hidden = [...section.querySelectorAll(".field")].every((element) => element.hidden);
  }
}

function fits({ field }) {
  if (!field.types.length) return true;
  return field.types.includes(fields.find((other) => other.path === field.chosen_by)?.value);
}

function filled() {
  const values = {};
  for (const field of fields.filter(fits)) {
    try {
      values[field.path] = field.value;
    } catch (error) {
      throw Object.assign(new Error(), {
        errors: [{ loc: field.path.split("."), msg: `must be JSON: ${error.message}` }],
      });
    }
  }
  return { method, job_uuid: jobUuid.value ?? "", fields: values };
}

async function submit(event) {
  event.preventDefault();
  for (const field of [jobUuid, ...fields]) field.refuse(null);
  byId("notice").replaceChildren();
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const job = await postJson("data/jobs", filled());
    location.assign(`job?${new URLSearchParams({ job_uuid: job.job_uuid })}`);
  } catch (error) {
    button.disabled = false;
    refuse(error);
  }
}

function refuse(error) {
  const taken = error.status === 409 ? [{ loc: ["job_uuid"], msg: error.message }] : [];
  const told = [...(error.errors ?? []), ...taken].map((rule) => [fieldOf(rule.loc.join(".")), rule]);
  const homeless = told.filter(([field]) => !field).map(([, rule]) => `${rule.loc.join(".")}: ${rule.msg}`);
  for (const [field, rule] of told) {
    field?.refuse(rule.msg);
    field?.element.closest("details")?.setAttribute("open", "");
  }
  const first = told.find(([field]) => field)?.[0];
  const sentence = first ? "The job was not started: see the marked fields." : error.message;
  byId("notice").replaceChildren(notice([sentence, ...(first ? homeless : [])].join(" ")));
  if (!first) return byId("notice").scrollIntoView();
  first.control.focus();
}

/** The field that a rule names, or else the first one of the group that it names, or that holds its place. */
function fieldOf(path) {
  const seen = [jobUuid, ...fields.filter(fits)];
  return (
    seen.find((field) => field.path === path) ??
    seen.find((field) => path.startsWith(`${field.path}.`)) ??
    seen.find((field) => path && field.path.startsWith(`${path}.`))
  );
}

form.addEventListener("submit", submit);
start();
