// What the node holds blocks of.

import { bytes, short } from "../format.js";
import { Panel, Table } from "../ui.js";
import { html } from "../vendor/preact.js";

export function Models({ app, wide }) {
  const rows = app.node.namespaces.map((space) => ({
    key: space.digest,
    cells: [
      html`<span class="clip" title=${space.fields.model}>${space.fields.model}</span>
        <span class="under"><code>${short(space.digest)}</code> ${[space.fields.dtype, space.fields.lora && "adapter", `tenant ${space.fields.tenant}`].filter(Boolean).join(" · ")}</span>`,
      space.block_bytes ? bytes(space.block_bytes) : "–",
      html`<button type="button" class="small" disabled=${!app.can("admin")} onClick=${() => app.openPurge(space)} aria-label=${`Purge ${space.fields.model}`}>Purge…</button>`,
    ],
  }));
  return html`<${Panel} title="Models" name="models" wide=${wide}>
    <${Table} caption="Namespaces of this node" columns=${["Model", ">Block", ">~Purge"]} rows=${rows} empty="No engine has opened a namespace yet." />
  <//>`;
}
