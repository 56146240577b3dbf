// The prompts that are asked for most.

import { ago, bytes, count, seconds, short } from "../format.js";
import { Panel, Table, Tiers } from "../ui.js";
import { html, useState } from "../vendor/preact.js";

const SHOWN = 8;

export function Hot({ app }) {
  const prompts = app.parts.hot ?? [];
  const [all, setAll] = useState(false);
  const rows = prompts.slice(0, all ? prompts.length : SHOWN).map((prompt) => ({
    key: prompt.key,
    cells: [
      html`<button type="button" class="link mono" data-row onClick=${() => app.openPrompt(prompt.key)} aria-label=${`Open prompt ${short(prompt.key)}`}>${short(prompt.key)}</button>`,
      app.modelOf(prompt.namespace) ?? html`<span class="dim">unknown</span>`,
      count(prompt.tokens),
      bytes(prompt.bytes),
      prompt.hits.toFixed(1),
      seconds(prompt.hits * prompt.seconds_saved),
      ago(prompt.last_used, app.now),
      html`<${Tiers} media=${prompt.media} />`,
    ],
  }));
  return html`<${Panel} title="Hot prompts" name="hot" wide aside=${html`<span class="dim small">by prefill saved per byte; hits fade by half in an hour</span>`}>
    <${Table} caption="Hot prompts" columns=${["Prompt", "Model", ">Tokens", ">Size", ">Hits", ">Prefill saved", ">Last used", "Where"]} rows=${rows} empty="No prompt was asked for twice yet." />
    ${prompts.length > SHOWN && html`<button type="button" class="small foot" aria-expanded=${all} onClick=${() => setAll(!all)}>${all ? "Show fewer" : `Show all ${prompts.length}`}</button>`}
  <//>`;
}
