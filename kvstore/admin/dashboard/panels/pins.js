// Prompts that are kept until a deadline.

import { call } from "../api.js";
import { ago, count, short } from "../format.js";
import { TIERS } from "../samples.js";
import { Panel, Table } from "../ui.js";
import { html } from "../vendor/preact.js";

export function Pins({ app }) {
  const unpin = async (key) => {
    try {
      const { unpinned } = await call("DELETE", `v1/pins/${key}`);
      app.say(`Unpinned ${count(unpinned)} blocks`);
    } catch (error) {
      app.say(error.message);
    }
  };
  const rows = (app.parts.pins ?? []).map((pin) => ({
    key: pin.key,
    cells: [
      html`<button type="button" class="link mono" onClick=${() => app.openPrompt(pin.key)} aria-label=${`Open prompt ${short(pin.key)}`}>${short(pin.key)}</button>`,
      count(pin.blocks),
      TIERS.filter((tier) => pin.held[tier]).map((tier) => `${tier} ${count(pin.held[tier])}`).join(" · "),
      `ends ${ago(pin.until, app.now)}`,
      html`<button type="button" class="small" disabled=${!app.can("operator")} onClick=${() => unpin(pin.key)} aria-label=${`Unpin ${short(pin.key)}`}>Unpin</button>`,
    ],
  }));
  return html`<${Panel} title="Pins" name="pins">
    <${Table} caption="Pinned prompts" columns=${["Prompt", ">Blocks", "Held", "Until", ">~Unpin"]} rows=${rows} empty="Nothing is pinned. Open a prompt to pin it." />
  <//>`;
}
