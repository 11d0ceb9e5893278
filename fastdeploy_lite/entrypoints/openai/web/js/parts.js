// Small parts that the panels share.
import { html, useEffect, useRef } from "../vendor/preact-htm.js";
import { t } from "./i18n.js";

export const Icon = ({ name }) =>
  html`<svg class="icon" aria-hidden="true"><use href=${`web/vendor/icons.svg#${name}`} /></svg>`;

export const IconButton = ({ icon, label, onClick, class: extra = "", ...rest }) =>
  html`<button type="button" class=${`icon-button ${extra}`} aria-label=${label} title=${label}
    onClick=${onClick} ...${rest}><${Icon} name=${icon} /></button>`;

export const Mark = () =>
  html`<svg class="mark" viewBox="0 0 18 18" aria-hidden="true"><rect width="8" height="8" rx="2" />
    <rect x="10" width="8" height="8" rx="2" class="faint" /><rect y="10" width="8" height="8" rx="2" class="faint" />
    <rect x="10" y="10" width="8" height="8" rx="2" /></svg>`;

/** A modal dialog; Escape, the button and a click beside it close it. */
export function Dialog({ title, onClose, children, class: extra = "" }) {
  const ref = useRef(null);
  useEffect(() => {
    ref.current.showModal();
  }, []);
  const beside = (event) => event.target === ref.current && onClose();
  return html`<dialog ref=${ref} class=${extra} onClose=${onClose} onMouseDown=${beside} aria-label=${title}>
    <div class="dialog-body">
      <header><h2>${title}</h2><${IconButton} icon="x" label=${t("close")} onClick=${onClose} /></header>
      ${children}
    </div>
  </dialog>`;
}

export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
