// Which prompt to explain; what comes of it is shown as any prompt is.

import { Dialog, Form, useAction } from "../ui.js";
import { html, useId, useState } from "../vendor/preact.js";

const WAYS = {
  request: ["Request id", "The engine's id of a recent request, or its start"],
  key: ["Block key", "32 hexadecimal digits"],
  tokens: ["Token ids", "Separated by commas or blanks"],
  text: ["Text", "Needs the model's tokenizer beside the API"],
};

export function ExplainDialog({ app, onClose }) {
  const [way, setWay] = useState("request");
  const [text, setText] = useState("");
  const spaces = app.node?.namespaces ?? [];
  const [space, setSpace] = useState(spaces[0]?.digest ?? "");
  const id = useId();
  const needsSpace = way === "tokens" || way === "text";
  const action = useAction(async () => app.explained(asPrompt(way, text, space)));
  const [label, hint] = WAYS[way];
  return html`<${Dialog} title="Explain a prompt" onClose=${onClose}>
    <p class="dim">Where each of its blocks is, what happened to it, and why it was missed.</p>
    <${Form} action=${action} label="Explain" disabled=${!text.trim() || (needsSpace && !space)}>
      <fieldset class="choice wide"><legend class="unseen">Name it by</legend>
        ${Object.entries(WAYS).map(([name, [title]]) => html`<label class=${name === way ? "chosen" : ""}><input type="radio" name="way" checked=${name === way} onChange=${() => setWay(name)} />${title}</label>`)}
      </fieldset>
      ${needsSpace && html`<label for=${`${id}-space`}>Model</label>
        <select id=${`${id}-space`} value=${space} onChange=${(event) => setSpace(event.target.value)}>
          ${spaces.map((one) => html`<option value=${one.digest}>${one.fields.model} (${one.digest.slice(0, 8)})</option>`)}
        </select>`}
      <label for=${id}>${label}</label>
      ${needsSpace
        ? html`<textarea id=${id} rows="4" value=${text} onInput=${(event) => setText(event.target.value)} placeholder=${hint}></textarea>`
        : html`<input id=${id} class="mono" value=${text} onInput=${(event) => setText(event.target.value)} placeholder=${hint} autocomplete="off" spellcheck=${false} autofocus />`}
    <//>
  <//>`;
}

/** The prompt as the API takes it. Throws with what to mend. */
export function asPrompt(way, text, namespace) {
  if (way === "text") return { text, namespace };
  if (way !== "tokens") return { [way]: text.trim() };
  const tokens = text.split(/[\s,[\]]+/).filter(Boolean).map(Number);
  if (!tokens.every((id) => Number.isInteger(id) && id >= 0)) throw new Error("Token ids are whole numbers");
  return { tokens, namespace };
}
