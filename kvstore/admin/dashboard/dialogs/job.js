// Start long work. What can be asked for is what the API's kinds of job say they take.

import { get, post } from "../api.js";
import { Dialog, Form, Problem, useAction } from "../ui.js";
import { html, useEffect, useId, useState } from "../vendor/preact.js";

export function JobDialog({ app, onClose }) {
  const [kinds, setKinds] = useState([]);
  const [chosen, choose] = useState("");
  const [values, setValues] = useState({});
  const [problem, setProblem] = useState("");
  const [typed, type] = useState("");
  const id = useId();
  useEffect(() => {
    get("v1/job-kinds").then(
      (found) => {
        setKinds(found);
        choose((found.find((kind) => kind.name === "warm") ?? found[0])?.name ?? "");
      },
      (error) => setProblem(error.message),
    );
  }, []);
  const kind = kinds.find((one) => one.name === chosen);
  const deletes = kind?.role === "admin";
  const fields = Object.entries(kind?.options.properties ?? {});
  const action = useAction(async () => {
    const options = Object.fromEntries(fields.map(([name, field]) => [name, asOption(field, values[name])]).filter(([, value]) => value !== undefined));
    const job = await post("v1/jobs", { kind: chosen, options });
    app.say(`${job.kind} started`);
    onClose();
  });
  return html`<${Dialog} title="Start a job" onClose=${onClose}>
    ${problem && html`<${Problem}>${problem}<//>`}
    <${Form} action=${action} label="Start" danger=${deletes} disabled=${!kind || (deletes && typed !== kind.name)}>
      <fieldset class="kinds"><legend class="unseen">What to run</legend>
        ${kinds.map((one) => html`<label class=${one.name === chosen ? "chosen" : ""}>
          <input type="radio" name="kind" value=${one.name} checked=${one.name === chosen} disabled=${!app.can(one.role)} onChange=${() => (choose(one.name), setValues({}), type(""))} />
          <span><b>${one.name}</b><span class="dim small">${one.summary}${app.can(one.role) ? "" : ` Needs the role ${one.role}.`}</span></span>
        </label>`)}
      </fieldset>
      ${fields.map(([name, field]) => html`<${Option} key=${`${chosen} ${name}`} name=${name} field=${field} value=${values[name] ?? ""} onInput=${(value) => setValues({ ...values, [name]: value })} />`)}
      ${deletes && html`<label for=${id}>This cannot be undone. Type <b class="mono">${kind.name}</b> to confirm</label>
        <input id=${id} value=${typed} onInput=${(event) => type(event.target.value)} autocomplete="off" spellcheck=${false} />`}
    <//>
  <//>`;
}

function Option({ name, field, value, onInput }) {
  const id = useId();
  const example = [field.examples?.[0]].flat().filter(Boolean).join(", ");
  return html`<label for=${id}>${name} <span class="dim small">${field.description ?? "optional"}</span></label>
    <input id=${id} name=${name} value=${value} onInput=${(event) => onInput(event.target.value)} placeholder=${example} autocomplete="off" />`;
}

/** What was typed, as JSON of the field's type; undefined to leave it to the job. */
export function asOption(field, text = "") {
  if (!text.trim()) return undefined;
  if (field.type === "array") return text.split(/[\s,]+/).filter(Boolean);
  if (field.type === "boolean") return text.trim() === "true";
  if (["integer", "number"].includes(field.type)) return Number(text);
  return text.trim();
}
