// One field of the form from its JSON schema: a control, its description, and where its errors are told.

import { h } from "./dom.js";

/** Makes the control that a schema asks for, reads it, and shows what the service says against its value. */
export class Field {
  constructor(field, onChange) {
    this.path = field.path;
    this.field = field;
    this.types = [field.json_schema.type].flat();
    const id = `field-${field.path}`;
    this.control = this.make(id);
    this.initial = this.entered;
    this.control.addEventListener("change", onChange);
    this.error = h("p", { class: "field-error", id: `${id}-error`, hidden: true });
    this.element = h(
      "div",
      { class: this.isFlag ? "field flag" : "field" },
      h(
        "label",
        { for: id },
        field.json_schema.title,
        field.required ? h("span", { class: "required" }, " required") : null,
      ),
      this.control,
      h("p", { class: "muted", id: `${id}-help` }, field.json_schema.description ?? ""),
      this.error,
    );
  }

  get isFlag() {
    return this.types.includes("boolean") && !this.field.json_schema.enum;
  }

  get isJson() {
    return this.types.includes("object");
  }

  make(id) {
    const { json_schema: schema, value, required } = this.field;
    const common = {
      id,
      name: this.path,
      "aria-describedby": `${id}-help ${id}-error`,
      "aria-required": required ? "true" : null,
    };
    if (schema.enum) return select(common, schema.enum, value);
    if (this.isFlag) return flag(common, value);
    if (this.isJson)
      return h("textarea", { ...common, rows: 3, spellcheck: "false" }, JSON.stringify(value ?? {}, null, 2));
    if (this.types.includes("array")) return h("textarea", { ...common, rows: 3 }, (value ?? []).join("\n"));
    const shown = value === null || value === undefined ? "" : String(value);
    const numeric = this.types.includes("number") || this.types.includes("integer");
    return h("input", { ...common, type: "text", inputmode: numeric ? "decimal" : null, value: shown });
  }

  /** The value as the service takes it; null where nothing is said. Throws where it is no JSON. */
  get value() {
    if (this.isFlag) {
      const untouched = this.field.value === null && !this.control.checked;
      return untouched ? null : this.control.checked;
    }
    const text = this.control.value.trim();
    if (this.field.json_schema.enum) return JSON.parse(this.control.value);
    if (this.isJson) return JSON.parse(text || "{}");
    if (this.types.includes("array"))
      return text
        ? text
            .split("\n")
            .map((line) => line.trim())
            .filter(Boolean)
        : arrayOf(this.field);
    return text === "" ? null : text;
  }

  /** What stands in the control. */
  get entered() {
    return this.isFlag ? this.control.checked : this.control.value;
  }

  get changed() {
    return this.entered !== this.initial;
  }

  /** Take what was entered in a field of the same kind, unless it is no choice here. */
  take(other) {
    if (other.control.type !== this.control.type) return;
    if (this.isFlag) this.control.checked = other.entered;
    else this.control.value = other.entered;
    if (this.control.selectedIndex === -1) this.control.value = this.initial;
  }

  refuse(sentence) {
    this.error.textContent = sentence ?? "";
    this.error.hidden = !sentence;
    if (sentence) this.control.setAttribute("aria-invalid", "true");
    else this.control.removeAttribute("aria-invalid");
  }

  show(visible) {
    this.element.hidden = !visible;
  }
}

function arrayOf(field) {
  return field.value === null ? null : [];
}

function select(common, choices, value) {
  const options = choices.map((choice) =>
    h(
      "option",
      { value: JSON.stringify(choice), selected: choice === value },
      choice === null ? "none" : String(choice),
    ),
  );
  return h("select", common, ...options);
}

function flag(common, value) {
  return h("input", { ...common, type: "checkbox", checked: value === true });
}
