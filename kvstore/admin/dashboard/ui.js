// Small pieces that panels are made of.

import { html, useEffect, useId, useRef, useState } from "./vendor/preact.js";

export function Panel({ title, name, aside, wide, children }) {
  const id = `panel-${name}`;
  return html`<section class=${`panel ${wide ? "wide" : ""}`} aria-labelledby=${id} data-panel=${name}>
    <header><h2 id=${id}>${title}</h2>${aside && html`<div class="aside">${aside}</div>`}</header>
    ${children}
  </section>`;
}

export const Empty = ({ children }) => html`<p class="empty">${children}</p>`;

/** Rows are arrays of cells. Columns that begin with ">" are right-aligned; a "~" hides a title that only listeners need. */
export function Table({ caption, columns, rows, empty, busy }) {
  if (!rows.length) return html`<${Empty}>${empty}<//>`;
  const right = columns.map((name) => name.startsWith(">"));
  return html`<div class="scroll">
    <table aria-busy=${busy}>
      <caption class="unseen">${caption}</caption>
      <thead><tr>${columns.map((name, at) => html`<th scope="col" class=${right[at] && "right"}><span class=${name.includes("~") ? "unseen" : ""}>${name.replace(/^[>~]+/, "")}</span></th>`)}</tr></thead>
      <tbody>
        ${rows.map(({ key, cells, ...attributes }) => html`<tr key=${key} ...${attributes}>
          ${cells.map((cell, at) => (at ? html`<td class=${right[at] && "right"}>${cell}</td>` : html`<th scope="row">${cell}</th>`))}
        </tr>`)}
      </tbody>
    </table>
  </div>`;
}

export const Badge = ({ kind, children }) => html`<span class=${`badge ${kind ?? ""}`}>${children}</span>`;

export function Tiers({ media }) {
  if (!media.length) return html`<span class="dim">nowhere</span>`;
  return html`<span class="tiers">${media.map((tier) => html`<span class=${`tier ${tier}`}>${tier}</span>`)}</span>`;
}

/** A bar of how full something is. */
export function Meter({ value, label, tier }) {
  const width = `${Math.min(Math.max(value, 0), 1) * 100}%`;
  return html`<div class=${`meter ${tier ?? ""}`} role="meter" aria-label=${label} aria-valuemin="0" aria-valuemax="100" aria-valuenow=${Math.round(value * 100)}>
    <div style=${{ width }}></div>
  </div>`;
}

/** A modal dialog: Escape and a click beside it close it, and the focus goes back to where it was. */
export function Dialog({ title, onClose, size, children }) {
  const element = useRef(null);
  const id = useId();
  useEffect(() => {
    const before = document.activeElement;
    element.current.showModal();
    return () => before?.focus?.();
  }, []);
  const aside = (event) => event.target === element.current && onClose();
  const cancel = (event) => {
    event.preventDefault();
    onClose();
  };
  return html`<dialog ref=${element} class=${size} aria-labelledby=${id} onMouseDown=${aside} onCancel=${cancel}>
    <div class="body">
      <header><h2 id=${id}>${title}</h2><button type="button" class="quiet" aria-label="Close" onClick=${onClose}>✕</button></header>
      ${children}
    </div>
  </dialog>`;
}

/** Runs an action once at a time; `problem` is what came of the last one. */
export function useAction(action) {
  const [state, set] = useState({ busy: false, problem: "" });
  const run = async (...args) => {
    set({ busy: true, problem: "" });
    try {
      await action(...args);
      set({ busy: false, problem: "" });
    } catch (error) {
      set({ busy: false, problem: error.message });
    }
  };
  return { ...state, run };
}

export const Problem = ({ children }) => html`<p class="problem" role="alert">${children}</p>`;

/** A form whose Enter and main button do the same. */
export function Form({ action, label, danger, disabled, children }) {
  const submit = (event) => {
    event.preventDefault();
    if (!disabled && !action.busy) action.run();
  };
  return html`<form onSubmit=${submit}>
    ${children}
    ${action.problem && html`<${Problem}>${action.problem}<//>`}
    <div class="actions"><button class=${danger ? "danger" : "main"} disabled=${disabled || action.busy}>${action.busy ? "…" : label}</button></div>
  </form>`;
}

/** Deleting: the name has to be typed. */
export function ConfirmByName({ title, name, label, children, act, onClose }) {
  const [typed, type] = useState("");
  const id = useId();
  const action = useAction(async () => {
    await act();
    onClose();
  });
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <${Form} action=${action} label=${label} danger disabled=${typed !== name}>
      ${children}
      <label for=${id}>Type <b class="mono">${name}</b> to confirm</label>
      <input id=${id} value=${typed} onInput=${(event) => type(event.target.value)} autocomplete="off" autofocus spellcheck=${false} />
    <//>
  <//>`;
}
