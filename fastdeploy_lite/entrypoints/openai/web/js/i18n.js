// Texts of the page in English and Chinese; `{name}` is replaced.

const en = {
  chat: "Chat", server: "Server", api: "API",
  newChat: "New chat", search: "Search", noMatch: "Nothing found", today: "Today",
  yesterday: "Yesterday", week: "Last 7 days", older: "Older",
  noChats: "Your conversations appear here. They stay in this browser.",
  untitled: "New conversation", rename: "Rename", remove: "Delete",
  removeAsk: "Delete “{title}”?", removeAll: "Delete all conversations",
  removeAllAsk: "Delete all {count} conversations in this browser?",
  showSidebar: "Show conversations", hideSidebar: "Hide conversations", settings: "Settings",
  greeting: "What would you like to ask?", demoHint:
    "This is the packaged demo model: 37 million parameters in 2 bits. It recites Tang poems; it is not an assistant.",
  placeholder: "Message {model}", placeholderPlain: "Write a message", send: "Send", stop: "Stop",
  hint: "Enter to send, Shift+Enter for a new line",
  context: "Context", contextTitle: "{used} of {limit} tokens of the context are in use",
  copy: "Copy", copied: "Copied", edit: "Edit", regenerate: "Regenerate", cancel: "Cancel",
  save: "Save", saveSend: "Send again", close: "Close", you: "You", model: "Model",
  thinking: "Thinking…", thought: "Thought for {seconds} s", thoughtPlain: "Thinking",
  toolCall: "Calls {name}", toolResult: "Result of {name}", giveResult: "Result to give back",
  sendResult: "Send result", waiting: "Waiting for the first token…",
  rate: "{rate} tokens/s", ttft: "{seconds} s to first token", tokens: "{count} tokens",
  cached: "{cached} of {prompt} prompt tokens from cache", prompt: "{prompt} prompt tokens",
  stopped: "Stopped", cutOff: "Cut off: the limit of {count} tokens was reached",
  interrupted: "Interrupted", goOn: "Continue",
  failed: "That did not work", retry: "Try again", dropOldest: "Try without the oldest turns",
  dropped: "The {count} oldest messages are no longer sent: the context is full.",
  offline: "The server does not answer. Trying again…",
  keyTitle: "API key", keyText: "This server asks for a key. It is kept in this browser only.",
  keyWrong: "The server refuses this key.", keySave: "Use this key", keyClear: "Forget the key",
  toBottom: "To the newest message",
  conversation: "This conversation", system: "System prompt",
  systemHint: "How the model should answer, for instance “Answer in one sentence.”",
  sampling: "Sampling", samplingHint: "Empty fields take the model's defaults.",
  temperature: "Temperature", topP: "Top-p", topK: "Top-k", maxTokens: "Longest answer, tokens",
  repetition: "Repetition penalty", seed: "Seed", thinkingMode: "Thinking",
  auto: "Default", on: "On", off: "Off",
  tools: "Tools", toolsHint: "A JSON list of functions in OpenAI's form. Calls are shown; you give the results.",
  toolsBad: "This is not a JSON list of functions: {error}",
  page: "This page", language: "Language", theme: "Appearance", system_: "System", light: "Light",
  dark: "Dark", data: "Conversations", exportAll: "Export", importAll: "Import",
  exportOne: "Export as Markdown", imported: "{count} conversations imported",
  importBad: "This file is not an export of this page",
  defaults: "Use for new conversations",
  shortcuts: "Keyboard", kNew: "New chat", kSearch: "Search conversations", kFocus: "Write a message",
  kStop: "Stop the answer", kEdit: "Edit your last message", kHelp: "This list", kSend: "Send",
  kLine: "New line", kTab: "Chat or server",
  ex1: "Recite a poem", ex1p: "《静夜思》的作者是谁？", ex2: "Explain a word", ex2p: "What is a gourd?",
  ex3: "Write some code", ex3p: "Write a Python function that returns the n-th prime number.",
  ex4: "Do some maths", ex4p: "Prove that the square root of 2 is irrational.",
  ex5: "Three poems of Li Bai", ex5p: "解析三首李白的诗", ex6: "Continue a line", ex6p: "床前明月光，下一句是什么？",
  ex7: "Translate", ex7p: "Translate into Chinese: “A journey of a thousand miles begins with a single step.”",
  ex8: "Summarise", ex8p: "Summarise the history of the printing press in five sentences.",
  running: "Running", waitingReq: "Waiting", preempted: "Preempted", kv: "KV cache",
  kvText: "{used} in use, {cached} cached prefixes, {free} free of {total} blocks",
  genRate: "Generation, tokens/s", promptRate: "Prompts, tokens/s", hitRate: "Prefix cache hits",
  hitText: "of prompt tokens", meanTtft: "Time to first token", meanTpot: "Time per token",
  mean: "mean since start", totals: "Since start", requests: "Requests", completed: "Completed",
  promptTokens: "Prompt tokens", genTokens: "Generated tokens", steps: "Engine steps",
  details: "Server", version: "Version", modelName: "Model", contextLength: "Context length",
  batch: "Sequences at a time", blockSize: "KV block", blockTokens: "{count} tokens", healthy: "Healthy", unhealthy: "Not healthy",
  lastMinutes: "last two minutes", most: "at most {value}", noTraffic: "No requests yet. Start a chat and watch.",
  noMetrics: "No metrics on this port",
  noMetricsText: "The server was started with --metrics-port: its metrics live on that port. Without the flag they are shown here.",
  path: "Kept in this browser; the server stores nothing.",
};

const zh = {
  chat: "对话", server: "服务器", api: "接口",
  newChat: "新对话", search: "搜索", noMatch: "没有找到", today: "今天", yesterday: "昨天",
  week: "最近 7 天", older: "更早",
  noChats: "对话会显示在这里，只保存在本浏览器中。",
  untitled: "新的对话", rename: "重命名", remove: "删除", removeAsk: "删除“{title}”？",
  removeAll: "删除全部对话", removeAllAsk: "删除本浏览器中的全部 {count} 个对话？",
  showSidebar: "显示对话列表", hideSidebar: "隐藏对话列表", settings: "设置",
  greeting: "想聊点什么？",
  demoHint: "这是随包附带的演示模型：3700 万参数，2 比特。它会背唐诗，但不是助手。",
  placeholder: "给 {model} 发消息", placeholderPlain: "写消息", send: "发送", stop: "停止",
  hint: "Enter 发送，Shift+Enter 换行",
  context: "上下文", contextTitle: "上下文已用 {used} / {limit} 个词元",
  copy: "复制", copied: "已复制", edit: "编辑", regenerate: "重新生成", cancel: "取消", save: "保存",
  saveSend: "重新发送", close: "关闭", you: "你", model: "模型",
  thinking: "思考中…", thought: "思考了 {seconds} 秒", thoughtPlain: "思考过程",
  toolCall: "调用 {name}", toolResult: "{name} 的结果", giveResult: "要返回的结果", sendResult: "发送结果",
  waiting: "等待第一个词元…",
  rate: "{rate} 词元/秒", ttft: "首词元 {seconds} 秒", tokens: "{count} 个词元",
  cached: "提示词 {prompt} 个词元中 {cached} 个来自缓存", prompt: "提示词 {prompt} 个词元",
  stopped: "已停止", cutOff: "已截断：达到 {count} 个词元的上限", interrupted: "已中断", goOn: "继续",
  failed: "出错了", retry: "重试", dropOldest: "去掉最早的几轮再试",
  dropped: "上下文已满：最早的 {count} 条消息不再发送。",
  offline: "服务器没有响应，正在重试…",
  keyTitle: "API 密钥", keyText: "此服务器需要密钥。密钥只保存在本浏览器中。",
  keyWrong: "服务器不接受这个密钥。", keySave: "使用此密钥", keyClear: "忘记密钥",
  toBottom: "到最新消息",
  conversation: "当前对话", system: "系统提示词", systemHint: "希望模型怎样回答，例如“用一句话回答。”",
  sampling: "采样", samplingHint: "留空则使用模型的默认值。",
  temperature: "温度", topP: "Top-p", topK: "Top-k", maxTokens: "回答的最大词元数",
  repetition: "重复惩罚", seed: "随机种子", thinkingMode: "思考", auto: "默认", on: "开", off: "关",
  tools: "工具", toolsHint: "OpenAI 格式的函数列表（JSON）。调用会显示出来，由你给出结果。",
  toolsBad: "不是函数的 JSON 列表：{error}",
  page: "本页面", language: "语言", theme: "外观", system_: "跟随系统", light: "浅色", dark: "深色",
  data: "对话数据", exportAll: "导出", importAll: "导入", exportOne: "导出为 Markdown",
  imported: "已导入 {count} 个对话", importBad: "这个文件不是本页面导出的",
  defaults: "用于新对话",
  shortcuts: "键盘", kNew: "新对话", kSearch: "搜索对话", kFocus: "写消息", kStop: "停止回答",
  kEdit: "编辑上一条消息", kHelp: "本列表", kSend: "发送", kLine: "换行", kTab: "对话或服务器",
  ex1: "背一首诗", ex1p: "《静夜思》的作者是谁？", ex2: "解释一个词", ex2p: "什么是葫芦？",
  ex3: "写一段代码", ex3p: "写一个返回第 n 个素数的 Python 函数。",
  ex4: "做一道数学题", ex4p: "证明根号 2 是无理数。",
  ex5: "李白的三首诗", ex5p: "解析三首李白的诗", ex6: "接下一句", ex6p: "床前明月光，下一句是什么？",
  ex7: "翻译", ex7p: "翻译成英文：“千里之行，始于足下。”", ex8: "总结", ex8p: "用五句话总结印刷术的历史。",
  running: "运行中", waitingReq: "等待中", preempted: "被抢占", kv: "KV 缓存",
  kvText: "共 {total} 块：使用 {used}，前缀缓存 {cached}，空闲 {free}",
  genRate: "生成，词元/秒", promptRate: "提示词，词元/秒", hitRate: "前缀缓存命中", hitText: "占提示词词元",
  meanTtft: "首词元时间", meanTpot: "每词元时间", mean: "启动以来平均", totals: "启动以来",
  requests: "请求", completed: "完成", promptTokens: "提示词词元", genTokens: "生成词元", steps: "引擎步数",
  details: "服务器", version: "版本", modelName: "模型", contextLength: "上下文长度",
  batch: "并发序列数", blockSize: "KV 块", blockTokens: "{count} 个词元", healthy: "正常", unhealthy: "不可用",
  lastMinutes: "最近两分钟", most: "最高 {value}", noTraffic: "还没有请求。开始一个对话试试看。",
  noMetrics: "此端口没有指标",
  noMetricsText: "服务器使用了 --metrics-port，指标在那个端口上。不带该参数启动时会显示在这里。",
  path: "只保存在本浏览器中；服务器不保存任何内容。",
};

const tables = { en, zh };
let table = en;
let name = "en";

/** The browser's language, if it is one of ours. */
export const preferred = () => (navigator.language?.toLowerCase().startsWith("zh") ? "zh" : "en");

export function setLanguage(wanted) {
  name = tables[wanted] ? wanted : preferred();
  table = tables[name];
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
}

export const language = () => name;

export function t(key, values = {}) {
  const text = table[key] ?? en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, field) => values[field] ?? whole);
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(name === "zh" ? "zh-CN" : "en", {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  }).format(value);

/** For tests: both languages must have the same keys. */
export const keys = () => Object.fromEntries(Object.entries(tables).map(([k, v]) => [k, Object.keys(v).sort()]));
