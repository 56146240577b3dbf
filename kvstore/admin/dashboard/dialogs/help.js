import { SHORTCUTS } from "../keys.js";
import { Dialog } from "../ui.js";
import { html } from "../vendor/preact.js";

export function HelpDialog({ onClose }) {
  return html`<${Dialog} title="Shortcuts" onClose=${onClose}>
    <dl class="keys">
      ${SHORTCUTS.map(([keys, does]) => html`<div><dt>${keys.split("  ").map((key) => html`<kbd>${key}</kbd>`)}</dt><dd>${does}</dd></div>`)}
    </dl>
  <//>`;
}
