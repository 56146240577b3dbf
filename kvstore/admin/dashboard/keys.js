// Keyboard shortcuts: single keys, while nothing is being typed and no dialog is open.

import { useEffect, useRef } from "./vendor/preact.js";

const typing = (target) => target instanceof Element && target.closest("input, textarea, select, dialog");

/** `shortcuts`: what to do by key. */
export function useShortcuts(shortcuts) {
  const now = useRef(shortcuts);
  now.current = shortcuts; // at once: effects wait for the next frame, and a key may come before it
  useEffect(() => {
    const pressed = (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
      const act = now.current[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

/** Move the focus among what the page lists as rows: `step` is 1 or -1. */
export function moveFocus(selector, step) {
  const rows = [...document.querySelectorAll(selector)];
  const at = rows.indexOf(document.activeElement);
  const next = at < 0 ? (step > 0 ? 0 : rows.length - 1) : Math.min(Math.max(at + step, 0), rows.length - 1);
  rows[next]?.focus();
}

export const SHORTCUTS = [
  ["?", "these shortcuts"],
  ["e", "explain a prompt or a miss"],
  ["w", "start a job: warm-up, scrub"],
  ["j  k", "next, previous hot prompt"],
  ["Enter", "open the prompt"],
  ["←  →", "in a prompt: the block before, behind"],
  ["t", "light, dark, as the system"],
  ["Esc", "close a dialog"],
];
