import { call } from "../api.js";
import { count } from "../format.js";
import { TIERS } from "../samples.js";
import { ConfirmByName } from "../ui.js";
import { html } from "../vendor/preact.js";

/** Delete every block of a namespace. */
export function PurgeDialog({ app, space, onClose }) {
  const { model } = space.fields;
  const act = async () => {
    const { deleted } = await call("DELETE", `v1/namespaces/${space.digest}/blocks`);
    app.say(`Purged ${model}: ${describe(deleted)}`);
  };
  return html`<${ConfirmByName} title=${`Purge ${model}`} name=${model} label="Purge" act=${act} onClose=${onClose}>
    <p>Deletes every block of <b>${model}</b> (<code>${space.digest.slice(0, 8)}</code>) from ${everywhere(app.node)}. Engines compute these prompts anew. This cannot be undone.</p>
  <//>`;
}

/** Where a deletion reaches. */
export const everywhere = (node) =>
  node.tiers.some((tier) => tier.medium === "object") ? "this node's memory and disk and from the region's bucket" : "this node's memory and disk";

/** What `deleted` of an answer says. */
export const describe = (deleted) =>
  TIERS.filter((tier) => deleted[tier]).map((tier) => `${count(deleted[tier])} blocks from ${tier}`).join(", ") || "no tier held a block";
