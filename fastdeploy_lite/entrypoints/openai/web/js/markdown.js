// Markdown of a model to safe HTML. What a model writes is never trusted: raw HTML is shown as text,
// images become links, DOMPurify filters what is left, and KaTeX builds its nodes last, untrusted.
import { Marked } from "../vendor/marked.js";
import { t } from "./i18n.js";

const { DOMPurify, katex, hljs } = window;
const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr",
    "li", "ol", "p", "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "start"], // they hold no address
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_TRUSTED_TYPE: true,
};
const HIGHLIGHT_LIMIT = 50_000;

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const escapes = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => String(text).replace(/[&<>"']/g, (c) => escapes[c]);

const mathNode = (tex, display) =>
  `<span class="math${display ? " display" : ""}">${escape(tex)}</span>`;

const blockMath = {
  name: "blockMath",
  level: "block",
  start: (src) => src.match(/(^|\n) {0,3}(\$\$|\\\[)/)?.index,
  tokenizer(src) {
    const found = /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\]) *(?:\n+|$)/.exec(src);
    if (found) return { type: "blockMath", raw: found[0], text: (found[1] ?? found[2]).trim() };
  },
  renderer: (token) => `<p>${mathNode(token.text, true)}</p>`,
};
const inlineMath = {
  name: "inlineMath",
  level: "inline",
  start: (src) => src.match(/\$|\\\(|\\\[/)?.index,
  tokenizer(src) {
    const display = /^(?:\$\$([^$]+?)\$\$|\\\[([\s\S]+?)\\\])/.exec(src);
    if (display) {
      return { type: "inlineMath", raw: display[0], text: display[1] ?? display[2], display: true };
    }
    // `$5 and $6` is money: no blank inside the dollars, no digit after them.
    const found = /^(?:\$(?!\s)((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)|\\\(([\s\S]+?)\\\))/.exec(src);
    if (found) return { type: "inlineMath", raw: found[0], text: found[1] ?? found[2] };
  },
  renderer: (token) => mathNode(token.text, token.display),
};

const parser = new Marked({
  gfm: true,
  breaks: true, // models lay out verse and lists by line
  extensions: [blockMath, inlineMath],
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => {
      const language = (lang ?? "").match(/^[\w+#.-]+/)?.[0].toLowerCase() ?? "";
      return `<pre><code class="language-${escape(language)}">${escape(text)}\n</code></pre>`;
    },
  },
});

function renderMath(root) {
  for (const node of root.querySelectorAll(".math")) {
    const source = node.textContent;
    try {
      katex.render(source, node, {
        displayMode: node.classList.contains("display"), throwOnError: true, trust: false,
        strict: "ignore", maxSize: 20, maxExpand: 200,
      });
    } catch {
      node.textContent = source;
      node.classList.add("math-error");
    }
  }
}

function decorateCode(root) {
  for (const code of root.querySelectorAll("pre > code")) {
    const language = code.className.replace(/^language-/, "");
    const source = code.textContent;
    if (hljs.getLanguage(language) && source.length <= HIGHLIGHT_LIMIT) {
      const { value } = hljs.highlight(source, { language, ignoreIllegals: true });
      code.innerHTML = DOMPurify.sanitize(value, ALLOWED);
    }
    const pre = code.parentElement;
    const frame = document.createElement("div");
    frame.className = "code";
    const bar = document.createElement("div");
    bar.className = "code-bar";
    const label = document.createElement("span");
    label.textContent = language || "text";
    const button = document.createElement("button");
    button.type = "button";
    button.className = "code-copy";
    button.textContent = t("copy");
    button.addEventListener("click", async () => {
      if (await copyText(source)) {
        button.textContent = t("copied");
        setTimeout(() => (button.textContent = t("copy")), 1500);
      }
    });
    bar.append(label, button);
    pre.replaceWith(frame);
    frame.append(bar, pre);
  }
}

/** Copy, also on plain HTTP where the clipboard's interface is missing. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "off-screen";
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/**
 * Shows `text` in `root`; only blocks that changed since the last call are rendered again, so that a
 * long answer streams smoothly and a selection in its finished part survives.
 */
export function showMarkdown(root, text) {
  const blocks = parser.lexer(text).filter((token) => token.type !== "space" && token.type !== "def");
  const shown = (root.blocks ??= []);
  blocks.forEach((token, i) => {
    if (shown[i]?.raw === token.raw) return;
    const block = document.createElement("div");
    block.className = "block";
    block.innerHTML = DOMPurify.sanitize(parser.parser([token]), ALLOWED);
    renderMath(block);
    decorateCode(block);
    shown[i] ? shown[i].node.replaceWith(block) : root.append(block);
    shown[i] = { raw: token.raw, node: block };
  });
  for (const extra of shown.splice(blocks.length)) extra.node.remove();
}
