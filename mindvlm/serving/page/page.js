// The web page of the server. The text of a model becomes text nodes, never HTML. Each section begins with a line -- name:
//
//   words         the texts of the page in English and Chinese
//   helpers       making elements, copying, messages
//   settings      what this browser keeps, and the settings dialog
//   server        requests, errors, the API key, streams
//   models        the chooser, and what the chosen model is for
//   Markdown      the text of an answer as elements
//   tables        of Markdown, LaTeX and HTML
//   formulas      LaTeX as MathML
//   boxes         drawn on a picture
//   conversation  questions and answers
//   documents     their pages and the texts of these
//   composer      the next question, its pictures, and the examples
//   start         what the page listens to

// ---------------------------------------------------------------------------------------------------------------- words

const WORDS = {
  en: {
    skip: 'Skip to the question', model: 'Model', newChat: 'New conversation', language: '切换为中文', theme: 'Light or dark',
    settings: 'Settings', welcome: 'Ask about a picture',
    welcomeHint: 'Add a picture or a PDF, or start with an example.', conversation: 'Conversation',
    editing: 'Editing a question', cancel: 'Cancel', pictures: 'Pictures of the question', question: 'Question',
    placeholder: 'Ask something, or paste a picture', attach: 'Add pictures or documents', shoot: 'Take a picture',
    keys: 'Enter sends, Shift+Enter starts a line', send: 'Send', stop: 'Stop', drop: 'Drop pictures or documents',
    temperature: 'Temperature', topP: 'Top p', maxTokens: 'Longest answer, in tokens', seed: 'Seed', system: 'System message',
    pageQuestion: 'Question about each page of a document', dpi: 'Resolution of PDF pages, in dpi', apiKey: 'API key',
    ofModel: 'default of the model', random: 'random', reset: 'Reset', done: 'Done',
    stored: 'Settings stay in this browser. The API key is forgotten when the tab closes.', keyTitle: 'API key',
    keyHint: 'This server asks for a key. Its operator has it.', useKey: 'Use it', you: 'You', edit: 'Edit the question',
    copyText: 'Copy as text', copyMarkdown: 'Copy as Markdown', source: 'Show the source', again: 'Answer again',
    copied: 'Copied', notCopied: 'The browser does not allow copying', remove: 'Remove {0}',
    tokens: '{0} tokens', rate: '{0} tokens/s', first: 'first token after {0} s', cut: 'cut at the longest answer',
    repeated: 'cut, it repeated itself', stopped: 'stopped', empty: 'The answer is empty.', answering: 'The model is answering',
    answer: 'Answer: {0}', broken: 'The connection broke off. Ask again.',
    unreachable: 'The server cannot be reached. If it has ended, its last messages say why.',
    noAnswer: 'The server answered with status {0}.', busy: 'The server is busy; try again in {0} s.', retry: 'Try again',
    loading: 'The model is loading …', loadingMore: 'Another model is loading …',
    boxes: 'Boxes of the answer on the picture: {0}', pageCount: 'pages: {0}',
    readAll: 'Read all pages', saveText: 'Download the text', close: 'Close the document', page: 'Page {0}',
    readPage: 'Page {0}: read it', goToPage: 'Page {0}: go to its text', more: 'Show more pages',
    progress: '{0} of {1} pages', askPage: 'Ask about this page', opening: 'Opening {0} …', allRead: 'All pages are read',
    failed: 'Pages that were not read: {0}', readAgain: 'Read again',
    needsPicture: '{0} answers questions about a picture. Add one to the question.',
    tooMany: 'The pictures of a conversation are limited to {0}. Left out: {1}',
    tooManyAsked: 'The pictures of a conversation are limited to {0}; there are {1}. Remove some, or start a new conversation.',
  },
  zh: {
    skip: '跳到提问框', model: '模型', newChat: '新对话', language: 'Switch to English', theme: '浅色或深色', settings: '设置',
    welcome: '看图提问', welcomeHint: '添加图片或 PDF，或者从一个示例开始。', conversation: '对话', editing: '正在修改问题',
    cancel: '取消', pictures: '问题的图片', question: '问题', placeholder: '输入问题，或粘贴图片', attach: '添加图片或文档',
    shoot: '拍照', keys: 'Enter 发送，Shift+Enter 换行', send: '发送', stop: '停止', drop: '松开以添加图片或文档',
    temperature: '温度', topP: 'Top p', maxTokens: '回答的最大 token 数', seed: '随机种子', system: '系统消息',
    pageQuestion: '对文档每一页的提问', dpi: 'PDF 页面分辨率（dpi）', apiKey: 'API 密钥', ofModel: '模型默认值', random: '随机',
    reset: '恢复默认', done: '完成', stored: '设置保存在本浏览器中。关闭标签页后不保留 API 密钥。', keyTitle: 'API 密钥',
    keyHint: '该服务需要密钥，请向服务的管理者索取。', useKey: '使用', you: '你', edit: '修改问题', copyText: '复制为文本',
    copyMarkdown: '复制为 Markdown', source: '显示源文本', again: '重新回答', copied: '已复制', notCopied: '浏览器不允许复制',
    remove: '移除 {0}', tokens: '{0} 个 token', rate: '{0} token/s', first: '首个 token {0} 秒',
    cut: '达到最大长度，已截断', repeated: '内容重复，已截断', stopped: '已停止', empty: '回答为空。', answering: '模型正在回答',
    answer: '回答：{0}', broken: '连接中断，请重新提问。',
    unreachable: '无法连接服务。如果服务已退出，原因见其最后输出的消息。', noAnswer: '服务返回状态码 {0}。',
    busy: '服务繁忙，请在 {0} 秒后重试。', retry: '重试', loading: '模型正在加载……', loadingMore: '另一个模型正在加载……',
    boxes: '回答中的框：{0} 个',
    pageCount: '共 {0} 页', readAll: '识别全部页面', saveText: '下载文本', close: '关闭文档', page: '第 {0} 页',
    readPage: '第 {0} 页：识别', goToPage: '第 {0} 页：查看文本', more: '显示更多页面', progress: '{0} / {1} 页',
    askPage: '就此页提问', opening: '正在打开 {0} ……', allRead: '全部页面已识别',
    failed: '未能识别的页面：{0}', readAgain: '重新识别',
    needsPicture: '{0} 只回答关于图片的问题，请为问题添加图片。', tooMany: '一次对话最多 {0} 张图片。未添加：{1}',
    tooManyAsked: '一次对话最多 {0} 张图片，现有 {1} 张。请移除一些图片，或开始新对话。',
  },
};

function t(key, ...values) {
  const word = WORDS[language()][key];
  return values.reduce((text, value, index) => text.replace(`{${index}}`, () => value), word);
}

function language() {
  return settings.language ?? (navigator.language.startsWith('zh') ? 'zh' : 'en');
}

/** Writes the words of all elements that name theirs, in the current language. */
function translate() {
  document.documentElement.lang = language() === 'zh' ? 'zh-CN' : 'en';
  const value = (node, key) => t(key, ...(node.dataset.value === undefined ? [] : [node.dataset.value]));
  for (const node of document.querySelectorAll('[data-t]')) node.textContent = value(node, node.dataset.t);
  for (const node of document.querySelectorAll('[data-placeholder]')) node.placeholder = t(node.dataset.placeholder);
  for (const node of document.querySelectorAll('[data-label]')) label(node, value(node, node.dataset.label));
}

function label(node, text) {
  node.setAttribute('aria-label', text);
  if (node.localName === 'button') node.title = text;
}

// -------------------------------------------------------------------------------------------------------------- helpers

const find = (id) => document.getElementById(id);

function build(namespace, tag, attributes, children) {
  const node = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children);
  return node;
}

const el = (tag, attributes, ...children) => build('http://www.w3.org/1999/xhtml', tag, attributes, children);
const svg = (tag, attributes, ...children) => build('http://www.w3.org/2000/svg', tag, attributes, children);
const mathml = (tag, attributes, ...children) => build('http://www.w3.org/1998/Math/MathML', tag, attributes, children);

const icon = (name) => svg('svg', { 'aria-hidden': 'true' }, svg('use', { href: `#i-${name}` }));

/** Returns a button with an icon, whose name is a word. */
function iconButton(name, key, click, value) {
  const node = el('button', { type: 'button', class: 'icon', 'data-label': key, 'data-value': value, click }, icon(name));
  label(node, t(key, ...(value === undefined ? [] : [value])));
  return node;
}

function textButton(key, click, kind = 'plain') {
  return el('button', { type: 'button', class: kind, 'data-t': key, click }, t(key));
}

/** Says a text to screen readers. */
function say(text) {
  find('status').textContent = text;
}

function notify(text) {
  find('notice').textContent = text;
}

/** Runs what a person asked for and shows its problem. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    if (error instanceof Problem) notify(error.message);
    else if (error.name !== 'AbortError') throw error;
  }
}

async function copy(text) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copyFromField(text);
    say(t('copied'));
    return true;
  } catch {
    notify(t('notCopied'));
    return false;
  }
}

/** Copies where there is no clipboard object: on pages that come from another machine without TLS. */
function copyFromField(text) {
  const field = el('textarea', { class: 'hidden' });
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand('copy');
  field.remove();
  if (!isCopied) throw new Error('not copied');
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem(reader.error.message));
    reader.readAsDataURL(file);
  });
}

// ------------------------------------------------------------------------------------------------------------- settings

const DEFAULTS = { dpi: 200 };
const settings = { ...DEFAULTS, ...stored() };

function stored() {
  try {
    return JSON.parse(localStorage.getItem('mindvlm') ?? '{}');
  } catch {
    return {};
  }
}

function keep(changes) {
  Object.assign(settings, changes);
  localStorage.setItem('mindvlm', JSON.stringify(settings));
}

const apiKey = () => sessionStorage.getItem('mindvlm-key') ?? '';
const keepKey = (key) => sessionStorage.setItem('mindvlm-key', key.trim());

/** Returns the fields of a request that the settings give. */
function options() {
  const chosen = {};
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
    const value = settings[name];
    if (typeof value === 'number') chosen[name] = value;
  }
  return chosen;
}

function fillSettings() {
  for (const field of find('settings').querySelectorAll('[name]')) {
    field.value = field.name === 'key' ? apiKey() : settings[field.name] ?? '';
  }
}

function changeSetting({ target }) {
  if (target.name === 'key') keepKey(target.value);
  else if (target.validity.valid) {
    const value = target.type === 'number' && target.value ? target.valueAsNumber : target.value;
    keep({ [target.name]: value || value === 0 ? value : DEFAULTS[target.name] });
  }
  updateDocuments();
}

function resetSettings() {
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed', 'system', 'pageQuestion']) delete settings[name];
  keep(DEFAULTS);
  fillSettings();
  updateDocuments();
}

function isDark() {
  return settings.theme ? settings.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
}

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
}

// --------------------------------------------------------------------------------------------------------------- server

/** An error with a message for people. */
class Problem extends Error {
  constructor(message, { status, code } = {}) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** Returns the response of the server; asks for a key if it wants one. */
async function request(path, { body, signal } = {}) {
  for (;;) {
    const headers = body ? { 'Content-Type': 'application/json' } : {};
    // headers are bytes
    if (apiKey()) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(apiKey()))}`;
    const content = body && JSON.stringify(body);
    const response = await fetch(path, { method: body ? 'POST' : 'GET', headers, body: content, signal }).catch((error) => {
      throw error.name === 'AbortError' ? error : new Problem(t('unreachable'));
    });
    if (response.ok) return response;
    if (response.status !== 401 || !(await askKey())) throw await problemOf(response);
  }
}

async function problemOf(response) {
  const { error } = await response.json().catch(() => ({}));
  const wait = response.headers.get('Retry-After');
  // a person knows the file, not the field of the request that has it
  const message = error?.message?.replace(/^(url|messages)[\w.[\]]*: /, '') ?? t('noAnswer', response.status);
  const shown = response.status === 429 && wait ? `${t('busy', wait)} (${message})` : message;
  return new Problem(shown, { status: response.status, code: error?.code });
}

let askedKey = null;

/** Asks for the API key, once for all requests that wait for it; returns whether there is one. */
function askKey() {
  const dialog = find('key');
  askedKey ??= new Promise((resolve) => {
    dialog.returnValue = '';
    dialog.querySelector('input').value = '';
    dialog.addEventListener('close', () => {
      askedKey = null;
      if (dialog.returnValue === 'ok') keepKey(dialog.querySelector('input').value);
      resolve(dialog.returnValue === 'ok');
    }, { once: true });
    dialog.showModal();
  });
  return askedKey;
}

/** Yields the objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ''; ;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === 'AbortError' ? error : new Problem(t('broken'));
    });
    if (done) throw new Problem(t('broken'));
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith('data:'));
      const data = lines.map((line) => line.slice(5)).join('\n').trim();
      if (data === '[DONE]') return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** Fills an answer while it streams: its text, end and figures; calls `changed` after each piece. */
async function generate(messages, answer, signal, changed) {
  const start = performance.now();
  const body = { model: model(), messages, stream: true, stream_options: { include_usage: true }, ...options() };
  answer.model = model();
  for await (const chunk of events(await request('v1/chat/completions', { body, signal }))) {
    if (chunk.error) throw new Problem(chunk.error.message ?? t('broken'));
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content;
    if (piece) {
      answer.seconds ??= (performance.now() - start) / 1000;
      answer.text += piece;
      changed();
    }
    answer.finish = choice?.finish_reason ?? answer.finish;
    answer.reason = choice?.stop_reason ?? answer.reason;
    answer.usage = chunk.usage ?? answer.usage;
    answer.timings = chunk.timings ?? answer.timings;
  }
}

/** Generates an answer and records in it how it ended. */
async function complete(messages, answer, signal, changed) {
  try {
    await generate(messages, answer, signal, changed);
  } catch (error) {
    if (error.name === 'AbortError') answer.isStopped = true;
    else if (error instanceof Problem) answer.error = error.message;
    else throw error;
  } finally {
    answer.isDone = true;
    changed();
  }
}

// --------------------------------------------------------------------------------------------------------------- models

let cards = [];
let isModelChosen = false;
let nextLoad = null;

const model = () => find('model').value;

/** Returns the entry of the chosen model in the list of the server; undefined before the first is loaded. */
const card = () => cards.find(({ id }) => id === model());

/** Returns the words of a model about what it can do and what it cannot. */
function note() {
  const { note: english, note_zh: chinese } = card()?.scope ?? {};
  return (language() === 'zh' && chinese) || english || '';
}

/** Returns the question about each page of a document. */
function pageQuestion() {
  const { page_question: ofModel, questions } = card().scope;
  return settings.pageQuestion || ofModel || questions[0];
}

/** Returns whether other pictures and earlier turns would only confuse the model. */
const takesOnePicture = () => Boolean(card()?.scope.one_picture);

/** Lists the models, again until all are loaded. Without a key it waits for the person. */
async function loadModels() {
  let problem = null;
  try {
    cards = (await (await request('v1/models')).json()).data;
    listModels();
    await request('health');
  } catch (error) {
    problem = error;
  }
  const isLoading = problem?.code === 'loading';
  find('waiting').textContent = isLoading ? t(model() ? 'loadingMore' : 'loading') : problem?.message ?? '';
  const isLast = !problem || problem.status === 401;
  clearTimeout(nextLoad);
  nextLoad = isLast ? null : setTimeout(loadModels, 2000);
  find('send').disabled = !model() && !isLast;
}

/** Selects a model that reads for an open document, then the one of the conversation, then the one chosen last. */
function listModels() {
  const ids = cards.map(({ id }) => id);
  const hasAsked = turns.length || [...openDocuments].some(({ read }) => read.size);
  const isReaderDue = openDocuments.size && !hasAsked && !isModelChosen;
  const reader = isReaderDue && cards.find(({ scope }) => scope.page_question)?.id;
  const selected = [reader, hasAsked && model(), settings.model, model(), ids[0]].find((id) => ids.includes(id));
  const isSame = String([...find('model').options].map(({ value }) => value)) === String(ids);
  if (isSame && model() === selected) return;
  find('model').replaceChildren(...ids.map((id) => el('option', { value: id, selected: id === selected }, id)));
  showModel();
}

/** Shows what depends on the model. */
function showModel() {
  find('model').title = note();
  find('about').textContent = note() && `${model()}: ${note()}`;
  showExamples();
  updateDocuments();
}

// ------------------------------------------------------------------------------------------------------------- Markdown

const MAX_NESTED = 12;
const FENCE = /^\s*(```|~~~)\s*[\w+-]*\s*$/;
const HEADING = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const TITLE = /^\s*\\(title|(?:sub){0,2}section|author|caption|paragraph)\*?\{(.*)\}\s*$/;
const RULE = /^\s{0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^\s{0,3}>\s?/;
const ITEM = /^(\s*)([-*+•]|\d{1,9}[.)])\s+(.*)$/;
const COLUMNS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DISPLAY = /^\s*(\$\$|\\\[)/;
const BEGIN = /^\s*\\begin\{(\w+\*?)\}/;
const HTML_TABLE = /^\s*<table\b/i;
const PAGE_WIDE = /(\S)[ \t]*(\\begin\{(?:tabular|table)\*?\}|<table\b)/gi;
const BEHIND = /(\\end\{(?:tabular|table)\*?\}|<\/table>)[ \t]*(?=\S)/gi;
const MATH_BLOCKS = /^(equation|align|aligned|gather|multline|eqnarray|displaymath|math)\*?$/;
const INLINE = new RegExp([
  '(?<tick>`+)(?<code>[^`]{1,2000}?)\\k<tick>',
  '\\\\\\((?<paren>[^]{1,2000}?)\\\\\\)',
  '\\$\\$(?<double>[^$]{1,2000})\\$\\$',
  '\\$(?=\\S)(?<dollar>[^$\\n]{0,500}?[^\\s\\\\])\\$(?!\\d)',
  '\\*\\*(?=\\S)(?<bold>[^]{0,1000}?\\S)\\*\\*',
  '(?<![\\w*])\\*(?=[^\\s*])(?<italic>[^*\\n]{0,500}?[^\\s*])\\*(?![\\w*])',
  '~~(?=\\S)(?<gone>[^~\\n]{1,500})~~',
  '\\\\(?<style>textbf|textit|emph|underline|text|textrm)\\{(?<styled>[^{}]{0,1000})\\}',
  '!\\[(?<alt>[^\\]\\n]{0,300})\\]\\([^)\\s]{0,1000}\\)',
  '\\[(?<link>[^\\]\\n]{1,300})\\]\\((?<href>https?://[^)\\s]{1,1000})\\)',
  '<br\\s*/?>(?<br>)',
  '\\\\(?<escaped>[\\\\`*_{}[\\]()#+\\-.!$|&%~])',
].join('|'), 'g');

/** Returns the nodes of a text in Markdown with tables and formulas of LaTeX. */
function markdown(text) {
  const separate = text.replace(PAGE_WIDE, '$1\n$2').replace(BEHIND, '$1\n');
  return blocks(separate.split(/\r?\n/), 0);
}

function blocks(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) at += 1;
    else {
      const [node, next] = (depth < MAX_NESTED && block(lines, at, depth)) || paragraph(lines, at);
      nodes.push(node);
      at = next;
    }
  }
  return nodes;
}

/** Returns the block that begins at a line and the line behind it; null if none but a paragraph does. */
function block(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) {
    const end = endOf(lines, at + 1, (one) => one.trim() === match[1]);
    return [el('pre', {}, el('code', {}, lines.slice(at + 1, end).join('\n'))), end + 1];
  }
  if ((match = DISPLAY.exec(line))) return displayed(lines, at, match[1] === '$$' ? '$$' : '\\]');
  if ((match = BEGIN.exec(line))) return environment(lines, at, match[1], depth);
  if (HTML_TABLE.test(line)) {
    const end = endOf(lines, at, (one) => /<\/table>/i.test(one));
    return [htmlTable(lines.slice(at, end + 1).join('\n')), end + 1];
  }
  if ((match = HEADING.exec(line))) return [heading(match[1].length, match[2]), at + 1];
  if ((match = TITLE.exec(line))) return [title(match[1], match[2]), at + 1];
  if (RULE.test(line)) return [el('hr'), at + 1];
  if (line.includes('|') && COLUMNS.test(lines[at + 1] ?? '') && lines[at + 1].includes('-')) return pipeTable(lines, at);
  if (QUOTE.test(line)) {
    const end = endOf(lines, at, (one) => !QUOTE.test(one));
    const inner = lines.slice(at, end).map((one) => one.replace(QUOTE, ''));
    return [el('blockquote', {}, ...blocks(inner, depth + 1)), end];
  }
  return ITEM.test(line) ? list(lines, at, depth) : null;
}

/** Returns the first line from a place on for which something holds, the number of lines if none. */
function endOf(lines, from, holds) {
  const found = lines.slice(from).findIndex(holds);
  return found < 0 ? lines.length : from + found;
}

// tables and titles of LaTeX and headings begin everywhere, other blocks only behind a blank line
const startsBlock = (line) => [FENCE, HEADING, TITLE, DISPLAY, BEGIN, HTML_TABLE, ITEM].some((rule) => rule.test(line));

function paragraph(lines, at) {
  const end = endOf(lines, at + 1, (line) => !line.trim() || startsBlock(line));
  return [el('p', {}, ...inline(lines.slice(at, end).join('\n'))), end];
}

// below the headings of the page
const heading = (level, text) => el(`h${Math.min(level + 2, 6)}`, {}, ...inline(text));

function title(kind, text) {
  const level = { title: 1, section: 2, subsection: 3, subsubsection: 4 }[kind];
  return level ? heading(level, text.trim()) : el('p', { class: kind }, ...inline(text.trim()));
}

function displayed(lines, at, close) {
  const [first, ...rest] = lines.slice(at);
  const text = [first.trimStart().slice(2), ...rest].join('\n');
  const end = text.indexOf(close);
  const source = end < 0 ? text : text.slice(0, end);
  const behind = end < 0 ? '' : text.slice(end + 2).split('\n', 1)[0];
  const node = formula(source, true);
  const next = at + source.split('\n').length;
  return [behind.trim() ? el('div', {}, node, el('p', {}, ...inline(behind.trim()))) : node, next];
}

function environment(lines, at, name, depth) {
  let open = 0;
  const count = (line, word) => line.split(`\\${word}{${name}}`).length - 1;
  const end = endOf(lines, at, (line) => (open += count(line, 'begin') - count(line, 'end')) <= 0);
  const source = lines.slice(at, end + 1).join('\n').trim();
  const inner = source.slice(`\\begin{${name}}`.length).replace(new RegExp(`\\\\end\\{${name.replace('*', '\\*')}\\}\\s*$`), '');
  if (/^(tabular|array)/.test(name)) return [tabular(inner, depth), end + 1];
  if (MATH_BLOCKS.test(name)) return [formula(/^(equation|displaymath|math)/.test(name) ? inner : source, true), end + 1];
  const parts = inner.replace(/^(\[[^\]]*\])/, '').replace(/^\s*\\(centering|small|item)\b/gm, (_, word) => (word === 'item' ? '- ' : ''));
  return [el('div', {}, ...blocks(parts.split('\n'), depth + 1)), end + 1];
}

function list(lines, at, depth) {
  const [, { length: indent }, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const node = el(isOrdered ? 'ol' : 'ul');
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length > indent + 1 || match[1].length < indent || /\d/.test(match[2]) !== isOrdered) break;
    const end = endOf(lines, at + 1, (line) => !line.trim() || line.search(/\S/) <= indent + 1);
    const inner = [match[3], ...lines.slice(at + 1, end).map((line) => line.slice(indent + 2))];
    const parts = blocks(inner, depth + 1);
    const content = parts[0]?.localName === 'p' ? [...parts.shift().childNodes, ...parts] : parts;
    node.append(el('li', { value: isOrdered && parseInt(match[2], 10) }, ...content));
    at = end;
  }
  return [node, at];
}

/** Returns the nodes of a text in one block. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(...broken(text.slice(end, match.index)), inlineNode(match.groups, match[0]));
    end = match.index + match[0].length;
  }
  return [...nodes, ...broken(text.slice(end))];
}

function inlineNode(found, whole) {
  const math = found.paren ?? found.double ?? found.dollar;
  if (found.code !== undefined) return el('code', {}, found.code);
  if (math !== undefined) return formula(math, found.double !== undefined, whole);
  if (found.bold) return el('strong', {}, ...inline(found.bold));
  if (found.italic) return el('em', {}, ...inline(found.italic));
  if (found.gone) return el('s', {}, ...inline(found.gone));
  if (found.style) return el({ textbf: 'strong', textit: 'em', emph: 'em', underline: 'u' }[found.style] ?? 'span', {}, ...inline(found.styled));
  if (found.href) return el('a', { href: found.href, rel: 'noopener noreferrer', target: '_blank' }, found.link);
  if (found.br !== undefined) return el('br');
  // a picture in an answer is not loaded
  return document.createTextNode(found.alt ?? found.escaped);
}

function broken(text) {
  return text.split('\n').flatMap((line, index) => (index ? [el('br'), line] : [line])).filter((part) => part !== '');
}

/** Returns the text of rendered Markdown: tables with tabs, formulas as their source. */
function plainText(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.data;
  if (node.dataset?.source !== undefined) return node.dataset.source + (node.classList.contains('display') ? '\n' : '');
  const parts = [...node.childNodes].map(plainText);
  if (node.localName === 'tr') return `${parts.join('\t')}\n`;
  if (node.localName === 'br') return '\n';
  const isBlock = /^(p|h\d|li|pre|table|blockquote)$/.test(node.localName);
  return parts.join('') + (isBlock ? '\n' : '');
}

// --------------------------------------------------------------------------------------------------------------- tables

const MAX_SPAN = 50;
const LINES = /\\(hline|toprule|midrule|bottomrule)\b|\\(cline|cmidrule)(\([^)]*\))?\{[^}]*\}/g;

const framed = (table) => el('div', { class: 'table', tabindex: '0' }, table);
const span = (number) => Math.min(Math.max(Number(number), 1), MAX_SPAN);

function pipeTable(lines, at) {
  const end = endOf(lines, at + 2, (line) => !line.includes('|'));
  const aligns = cellsOf(lines[at + 1]).map((cell) => (/^:-+:$/.test(cell) ? 'center' : /-:$/.test(cell) ? 'right' : 'left'));
  const row = (line, tag) =>
    el('tr', {}, ...cellsOf(line).map((cell, column) => el(tag, { class: aligns[column] ?? 'left' }, ...inline(cell))));
  const body = lines.slice(at + 2, end).map((line) => row(line, 'td'));
  return [framed(el('table', {}, el('thead', {}, row(lines[at], 'th')), el('tbody', {}, ...body))), end];
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, '').replace(/(?<!\\)\|$/, '');
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim());
}

/** Returns a table for what lies between \begin{tabular} and \end{tabular}. */
function tabular(source, depth) {
  const body = source.replace(/^\s*(\[[^\]]*\])?\s*\{(?:[^{}]|\{[^{}]*\})*\}/, '').replace(LINES, '');
  const covered = [];
  const rows = pieces(body, '\\\\').filter((row) => row.trim());
  const table = el('table', {}, el('tbody', {}, ...rows.map((row) => tabularRow(row, covered, depth))));
  return framed(table);
}

/** Returns a row; `covered` has for each column the following rows that a cell above covers. */
function tabularRow(row, covered, depth) {
  const node = el('tr');
  let column = 0;
  for (const cell of pieces(row, '&')) {
    let text = cell.trim();
    const wide = /^\\multicolumn\{(\d+)\}\{[^}]*\}\s*\{([^]*)\}$/.exec(text);
    text = wide ? wide[2].trim() : text;
    const high = /^\\multirow(?:\[\w*\])?\{(\d+)\}\{[^}]*\}\s*\{([^]*)\}$/.exec(text);
    text = high ? high[2].trim() : text;
    const isCovered = covered[column] > 0;
    if (isCovered) covered[column] -= 1;
    if (!isCovered || text) {
      const attributes = { colspan: wide && span(wide[1]), rowspan: high && span(high[1]) };
      for (const name of ['colspan', 'rowspan']) attributes[name] ||= undefined;
      node.append(el('td', attributes, ...(text.includes('\\begin{') ? blocks(text.split('\n'), depth + 1) : inline(text))));
    }
    for (let i = 0; high && i < (wide ? span(wide[1]) : 1); i += 1) covered[column + i] = span(high[1]) - 1;
    column += wide ? span(wide[1]) : 1;
  }
  return node;
}

/** Splits a text at a separator outside of braces and environments. */
function pieces(text, separator) {
  const found = [];
  let level = 0;
  let start = 0;
  for (const match of text.matchAll(/\\begin\{|\\end\{|\\\\(?:\[[^\]]{0,20}\])?|\\.|[{}&]/gs)) {
    const [token] = match;
    // the brace of \begin{ is one level more, which its } ends
    if (token === '\\begin{') level += 2;
    else if (token === '{') level += 1;
    else if (token === '}') level = Math.max(level - 1, 0);
    else if (token !== '\\end{' && level === 0 && token.startsWith(separator)) {
      found.push(text.slice(start, match.index));
      start = match.index + token.length;
    }
  }
  return [...found, text.slice(start)];
}

/** Returns a table with the cells of one in HTML, of which only text is taken. */
function htmlTable(source) {
  // the document of a parser runs and loads nothing
  const parsed = new DOMParser().parseFromString(source, 'text/html');
  const cell = (one) => {
    const spans = { colspan: one.colSpan > 1 && span(one.colSpan), rowspan: one.rowSpan > 1 && span(one.rowSpan) };
    return el(one.localName, spans, ...inline(one.textContent.trim()));
  };
  const rows = [...parsed.querySelectorAll('tr')].map((row) => el('tr', {}, ...[...row.cells].map(cell)));
  return framed(el('table', {}, el('tbody', {}, ...rows)));
}

// ------------------------------------------------------------------------------------------------------------- formulas

const pairs = (text) => new Map([...text.matchAll(/(\S+)\s+(\S+)/g)].map(([, name, sign]) => [name, sign]));

const LETTERS = pairs(`alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ
  mu μ nu ν xi ξ pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω Gamma Γ Delta Δ
  Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω infty ∞ partial ∂ nabla ∇ ell ℓ hbar ℏ Re ℜ Im ℑ aleph ℵ
  emptyset ∅ varnothing ∅ forall ∀ exists ∃ angle ∠ prime ′ dots … ldots … cdots ⋯ vdots ⋮ ddots ⋱ degree ° top ⊤ bot ⊥ square □`);
const OPERATORS = pairs(`times × div ÷ cdot ⋅ pm ± mp ∓ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ otimes ⊗ odot ⊙ cap ∩ cup ∪ wedge ∧ vee ∨
  land ∧ lor ∨ neg ¬ lnot ¬ setminus ∖ le ≤ leq ≤ leqslant ⩽ ge ≥ geq ≥ geqslant ⩾ ne ≠ neq ≠ equiv ≡ sim ∼ simeq ≃ approx ≈ cong ≅
  propto ∝ ll ≪ gg ≫ prec ≺ succ ≻ subset ⊂ subseteq ⊆ supset ⊃ supseteq ⊇ in ∈ notin ∉ ni ∋ mid ∣ parallel ∥ perp ⊥ to → gets ←
  rightarrow → leftarrow ← leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ implies ⟹ iff ⟺ mapsto ↦ uparrow ↑
  downarrow ↓ longrightarrow ⟶ longleftarrow ⟵ colon : vert | Vert ‖ | ‖ { { } } lbrace { rbrace } langle ⟨ rangle ⟩ lfloor ⌊
  rfloor ⌋ lceil ⌈ rceil ⌉ lvert | rvert | lVert ‖ rVert ‖ because ∵ therefore ∴ int ∫ iint ∬ iiint ∭ oint ∮ # # $ $ % % & & _ _`);
const LARGE = pairs('sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigoplus ⨁ bigotimes ⨂ bigvee ⋁ bigwedge ⋀');
const ACCENTS = pairs('hat ^ widehat ^ bar ¯ overline ¯ vec → overrightarrow → tilde ~ widetilde ~ dot ˙ ddot ¨ overbrace ⏞ check ˇ');
const SPACES = pairs(', 0.17em : 0.22em ; 0.28em ! 0em quad 1em qquad 2em');
const FENCES = pairs(`pmatrix () bmatrix [] Bmatrix {} vmatrix || Vmatrix ‖‖ matrix . smallmatrix . cases {. aligned . align . split .
  gathered . gather . array . tabular . eqnarray . multline .`);
const FUNCTIONS = /^(arc)?(sin|cos|tan|cot|sec|csc|sinh|cosh|tanh)$|^(log|ln|lg|exp|det|dim|ker|deg|gcd|arg|Pr|hom|mod|bmod)$/;
const WITH_LIMITS = /^(lim|limsup|liminf|max|min|sup|inf|argmax|argmin)$/;
const TEXTS = /^(text(rm|bf|it|tt|sf|up)?|math(rm|sf|tt|it)|operatorname|[mh]box)$/;
const IGNORED = /^((display|text|script)style|(no)?limits|hline|nonumber|notag|middle|[bB]igg?[lrm]?)$/;
/** Alphabets of Unicode: their letters A and a. */
const ALPHABETS = { mathbf: '𝐀𝐚', boldsymbol: '𝐀𝐚', bm: '𝐀𝐚', mathbb: '𝔸𝕒', mathcal: '𝓐𝓪', mathscr: '𝓐𝓪', mathfrak: '𝕬𝖆' };
const DOUBLE_STRUCK = pairs('C ℂ H ℍ N ℕ P ℙ Q ℚ R ℝ Z ℤ');

/** Commands with arguments: functions of the parser. */
const COMMANDS = {
  frac: (parser) => mathml('mfrac', {}, parser.argument(), parser.argument()),
  binom: (parser) => {
    const inner = mathml('mfrac', { linethickness: '0' }, parser.argument(), parser.argument());
    return mathml('mrow', {}, operator('(', true), inner, operator(')', true));
  },
  sqrt: (parser) => {
    const index = parser.optional();
    return index ? mathml('mroot', {}, parser.argument(), new Formula(index).parse()) : mathml('msqrt', {}, parser.argument());
  },
  overset: (parser) => swapped('mover', parser.argument(), parser.argument()),
  underset: (parser) => swapped('munder', parser.argument(), parser.argument()),
  underline: (parser) => mathml('munder', {}, parser.argument(), operator('_')),
  underbrace: (parser) => withLimits(mathml('munder', {}, parser.argument(), operator('⏟'))),
  not: (parser) => operator(`${parser.argument().textContent}\u0338`),
  tag: (parser) => mathml('mtext', {}, `\u2003(${parser.raw()})`),
  left: (parser) => {
    const [open, inner] = [parser.delimiter(), parser.row((token) => token === '\\right')];
    parser.next('\\right');
    return mathml('mrow', {}, ...open, inner, ...parser.delimiter());
  },
  begin: (parser) => parser.environment(),
};
Object.assign(COMMANDS, { dfrac: COMMANDS.frac, tfrac: COMMANDS.frac, cfrac: COMMANDS.frac, stackrel: COMMANDS.overset });

const swapped = (tag, script, base) => mathml(tag, {}, base, script);
const withLimits = (node) => Object.assign(node, { hasLimits: true });

function operator(text, isStretched = false) {
  const isFence = '()[]{}|‖⟨⟩⌊⌋⌈⌉/'.includes(text);
  return mathml('mo', isFence ? { stretchy: String(isStretched), fence: isStretched && 'true' } : {}, text);
}

/** Returns a formula of LaTeX as MathML, or its source if it has something unknown. */
function formula(source, isDisplay, whole = `\\[${source}\\]`) {
  const kind = `formula ${isDisplay ? 'display' : 'inline'}`;
  try {
    const math = mathml('math', isDisplay ? { display: 'block' } : {}, new Formula(source).parse());
    return el('span', { class: kind, 'data-source': whole, tabindex: isDisplay && '0' }, math);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    return el('code', { class: kind, 'data-source': whole }, source.trim());
  }
}

/** A parser of the formulas that papers have; it throws SyntaxError at everything else. */
class Formula {
  constructor(source) {
    this.tokens = source.replace(/(^|[^\\])%.*$/gm, '$1').match(/\\[a-zA-Z]+|\\[^]|\d+(?:[.,]\d+)*|\s+|[^]/gu) ?? [];
    this.at = 0;
    this.depth = 0;
  }

  parse() {
    const rows = this.rows(() => false);
    return rows.length === 1 && rows[0].length === 1 ? rows[0][0] : this.grid(rows, 'aligned');
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? '')) this.at += 1;
    return this.tokens[this.at];
  }

  next(expected) {
    const token = this.peek();
    if (token === undefined || (expected && token !== expected)) throw new SyntaxError(`expected ${expected}`);
    this.at += 1;
    return token;
  }

  /** Returns the rows of cells up to a token. */
  rows(isEnd) {
    const rows = [[]];
    for (let token = '&'; token === '&' || token === '\\\\'; token = this.peek()) {
      if (rows[0].length) this.next();
      if (token === '\\\\') {
        this.optional();
        rows.push([]);
      }
      rows.at(-1).push(this.row((one) => one === '&' || one === '\\\\' || isEnd(one)));
    }
    if (rows.length > 1 && !rows.at(-1).some((cell) => cell.childNodes.length)) rows.pop();
    return rows;
  }

  row(isEnd) {
    const nodes = [];
    while (this.peek() !== undefined && !isEnd(this.peek())) nodes.push(this.scripted());
    return mathml('mrow', {}, ...nodes);
  }

  /** Returns an atom with its sub- and superscripts. */
  scripted() {
    const base = '^_'.includes(this.peek()) ? mathml('mrow') : this.atom();
    const scripts = {};
    for (let token = this.peek(); /^([_^']|\\(no)?limits)$/.test(token ?? ''); token = this.peek()) {
      this.next();
      if (token.length > 1) continue;
      const place = token === "'" ? '^' : token;
      const earlier = scripts[place];
      if (earlier && token !== "'" && earlier.localName !== 'mo') throw new SyntaxError(`two ${token}`);
      const added = token === "'" ? operator('′') : this.argument();
      scripts[place] = earlier ? mathml('mrow', {}, earlier, added) : added;
    }
    const { _: low, '^': high } = scripts;
    const [both, below, above] = base.hasLimits ? ['munderover', 'munder', 'mover'] : ['msubsup', 'msub', 'msup'];
    return low || high ? mathml(low && high ? both : low ? below : above, {}, ...[base, low, high].filter(Boolean)) : base;
  }

  /** Returns what a command or script applies to: a group or one character. */
  argument() {
    const token = this.peek() ?? '';
    if (!/^\d./.test(token)) return this.atom();
    this.tokens[this.at] = token.slice(1);
    return mathml('mn', {}, token[0]);
  }

  atom() {
    if ((this.depth += 1) > 40) throw new SyntaxError('nested too deeply');
    const token = this.next();
    const node = this.atomOf(token);
    this.depth -= 1;
    return node;
  }

  atomOf(token) {
    if (token === '{') {
      const inner = this.row((one) => one === '}');
      this.next('}');
      return inner;
    }
    if (token.length > 1 && token[0] === '\\') return this.command(token.slice(1));
    if (/^\d/.test(token)) return mathml('mn', {}, token);
    if (/^\p{L}/u.test(token)) return mathml('mi', {}, token);
    if ('&}\\^_#'.includes(token)) throw new SyntaxError(token);
    return operator({ '-': '−', '*': '∗', '~': '\u00a0' }[token] ?? token);
  }

  command(name) {
    if (LETTERS.has(name)) return mathml('mi', {}, LETTERS.get(name));
    if (OPERATORS.has(name)) return operator(OPERATORS.get(name));
    if (LARGE.has(name)) return withLimits(mathml('mo', { movablelimits: 'true' }, LARGE.get(name)));
    if (SPACES.has(name) || !name.trim()) return mathml('mspace', { width: SPACES.get(name) ?? '0.28em' });
    if (IGNORED.test(name)) return mathml('mrow');
    if (FUNCTIONS.test(name)) return mathml('mi', {}, name);
    if (WITH_LIMITS.test(name)) return withLimits(mathml('mi', {}, name));
    if (TEXTS.test(name)) return mathml('mtext', {}, this.raw().replace(/[~ ]/g, '\u00a0').replace(/\\(.)/g, '$1'));
    if (Object.hasOwn(ALPHABETS, name)) return inAlphabet(this.argument(), name);
    if (ACCENTS.has(name)) return mathml('mover', { accent: 'true' }, this.argument(), operator(ACCENTS.get(name)));
    if (Object.hasOwn(COMMANDS, name)) return COMMANDS[name](this);
    throw new SyntaxError(`\\${name}`);
  }

  environment() {
    const name = this.raw();
    const kind = name.replace('*', '');
    if (!FENCES.has(kind)) throw new SyntaxError(name);
    if (kind === 'array' || kind === 'tabular') this.raw();
    const rows = this.rows((token) => token === '\\end');
    this.next('\\end');
    if (this.raw() !== name) throw new SyntaxError(name);
    const [open, close] = [...FENCES.get(kind)].map((sign) => (sign === '.' ? '' : operator(sign, true)));
    return mathml('mrow', {}, open, this.grid(rows, kind), close ?? '');
  }

  grid(rows, kind) {
    const isAligned = /^(align|split|eqnarray)/.test(kind);
    const align = (column) => (isAligned ? ['right', 'left'][column % 2] : kind === 'cases' ? 'left' : 'center');
    const row = (cells) => mathml('mtr', {}, ...cells.map((cell, column) => mathml('mtd', { class: align(column) }, cell)));
    return mathml('mtable', isAligned ? { displaystyle: 'true' } : {}, ...rows.map(row));
  }

  delimiter() {
    const token = this.next();
    const sign = token.length > 1 ? OPERATORS.get(token.slice(1)) : { '<': '⟨', '>': '⟩' }[token] ?? token;
    if (sign === undefined) throw new SyntaxError(token);
    return sign === '.' ? [] : [operator(sign, true)];
  }

  /** Returns the text of a group, not parsed. */
  raw() {
    this.next('{');
    const start = this.at;
    for (let level = 1; level; this.at += 1) {
      if (this.at === this.tokens.length) throw new SyntaxError('expected }');
      level += { '{': 1, '}': -1 }[this.tokens[this.at]] ?? 0;
    }
    return this.tokens.slice(start, this.at - 1).join('');
  }

  /** Returns the text in brackets; null if there are none. */
  optional() {
    if (this.peek() !== '[') return null;
    const start = this.at + 1;
    this.at = this.tokens.indexOf(']', start) + 1;
    if (!this.at) throw new SyntaxError('expected ]');
    return this.tokens.slice(start, this.at - 1).join('');
  }
}

function inAlphabet(node, name) {
  const [upper, lower] = [...ALPHABETS[name]].map((letter) => letter.codePointAt(0));
  const mapped = (letter) => {
    const code = letter.charCodeAt(0);
    const isStruck = name === 'mathbb' && DOUBLE_STRUCK.has(letter);
    return isStruck ? DOUBLE_STRUCK.get(letter) : String.fromCodePoint(code < 97 ? upper + code - 65 : lower + code - 97);
  };
  const leaves = node.localName === 'mi' ? [node] : node.querySelectorAll('mi');
  for (const leaf of leaves) leaf.textContent = leaf.textContent.replace(/[A-Za-z]/g, mapped);
  return node;
}

// ---------------------------------------------------------------------------------------------------------------- boxes

const N = '\\s*(-?\\d{1,4}(?:\\.\\d{1,8})?)\\s*';
const BOX = new RegExp(`\\[${N},${N},${N},${N}\\]|\\(${N},${N}\\)\\s*,?\\s*\\(${N},${N}\\)`, 'g');

/** Returns the boxes of an answer, in fractions of the picture: thousandths, or fractions. */
function boxesOf(text) {
  const found = [];
  let [end, name] = [0, ''];
  for (const match of text.matchAll(BOX)) {
    const before = text.slice(end, match.index).replace(/<\/?(ref|box)>/g, '');
    if (!/^[\s,]*$/.test(before)) name = before.split(/[;\n]/).at(-1).replace(/^[\s,.]+|[\s:,]+$/g, '').slice(-40);
    end = match.index + match[0].length;
    found.push({ name, edges: match.slice(1).filter((one) => one !== undefined).map(Number) });
  }
  const scale = found.every(({ edges }) => edges.every((edge) => edge <= 1)) ? 1 : 1000;
  const cut = found.map(({ name: of, edges }) => ({ name: of, edges: edges.map((edge) => Math.max(edge, 0) / scale) }));
  return cut.filter(({ edges: [left, top, right, bottom] }) => left < right && top < bottom && right <= 1 && bottom <= 1);
}

/** Returns a picture with boxes drawn on it. */
function boxedPicture(picture, boxes) {
  const shapes = boxes.map(({ edges: [x, y, right, bottom] }, index) =>
    svg('rect', { x, y, width: right - x, height: bottom - y, class: `box b${index % 5}` }));
  const names = boxes.map(({ name, edges: [x, y] }, index) => {
    const node = el('span', { class: `name b${index % 5} ${y > 0.1 ? 'above' : ''}` }, name || String(index + 1));
    Object.assign(node.style, { left: `${100 * x}%`, top: `${100 * y}%` });
    return node;
  });
  const overlay = svg('svg', { viewBox: '0 0 1 1', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, ...shapes);
  const count = el('figcaption', { class: 'small' }, t('boxes', boxes.length));
  return el('figure', {}, el('div', { class: 'boxed' }, el('img', { src: picture.url, alt: picture.name }), overlay, ...names), count);
}

// --------------------------------------------------------------------------------------------------------- conversation

const turns = [];
const chosen = { pictures: [], edited: null };
let running = null;

const pictureParts = (pictures) => pictures.map(({ url }) => ({ type: 'image_url', image_url: { url } }));

function messagesUpTo(turn) {
  const message = ({ question, pictures }) => ({ role: 'user', content: [...pictureParts(pictures), { type: 'text', text: question }] });
  const earlier = turnsBefore(turn).flatMap((one) => [message(one), { role: 'assistant', content: one.answer.text }]);
  return [...systemMessage(), ...earlier, message(turn)];
}

/** Returns the answered turns that the model gets before one, or before the next question. */
function turnsBefore(turn) {
  const before = turn ? turns.slice(0, turns.indexOf(turn)) : turns;
  return takesOnePicture() ? [] : before.filter(({ answer }) => answer.text);
}

/** Returns how many pictures a conversation may have; a model of single pictures gets each alone. */
const pictureLimit = () => (takesOnePicture() ? Infinity : card()?.max_pictures ?? Infinity);

/** Returns how many pictures the next question may have. */
function pictureRoom() {
  return pictureLimit() - turnsBefore(chosen.edited).reduce((sum, { pictures }) => sum + pictures.length, 0);
}

const systemMessage = () => (settings.system ? [{ role: 'system', content: settings.system }] : []);

/** Asks a question; a model of single pictures is asked about each. */
async function askAll(question, pictures) {
  const parts = takesOnePicture() ? pictures.map((picture) => [picture]) : [pictures];
  for (const part of parts) {
    const { isStopped } = await ask(question, part);
    if (isStopped) return;
  }
}

async function ask(question, pictures) {
  const turn = { question, pictures, node: el('article', { class: 'turn' }) };
  turns.push(turn);
  find('talk').append(turn.node);
  await answerTurn(turn);
  return turn.answer;
}

/** Answers a question, again if it has an answer; what follows it goes. */
async function answerTurn(turn) {
  dropAfter(turns.indexOf(turn) + 1);
  turn.answer = { text: '' };
  turn.body = el('div', { class: 'answer', 'aria-busy': 'true' }, el('span', { class: 'cursor' }));
  turn.node.replaceChildren(questionNode(turn), turn.body);
  scrollDown();
  say(t('answering'));
  running = new AbortController();
  showRunning();
  let isDue = false;
  const { answer } = turn;
  await complete(messagesUpTo(turn), answer, running.signal, () => {
    if (answer.isDone) showAnswer(turn);
    else if (!isDue) {
      isDue = true;
      setTimeout(() => {
        isDue = false;
        if (!answer.isDone) showAnswer(turn);
      }, 60);
    }
  });
  if (turn.answer !== answer || !turn.node.isConnected) return;
  running = null;
  showRunning();
  say(answer.error ?? t('answer', answer.text || t('empty')));
}

function dropAfter(count) {
  running?.abort();
  for (const { node } of turns.splice(count)) node.remove();
}

function questionNode(turn) {
  const shown = turn.pictures.map(({ url, name }) => el('img', { src: url, alt: name }));
  const edit = iconButton('edit', 'edit', () => editTurn(turn));
  return el('div', { class: 'question' }, el('h2', { class: 'hidden', 'data-t': 'you' }, t('you')),
    el('div', { class: 'shown' }, ...shown), el('div', { class: 'asked' }, edit, el('p', {}, turn.question)));
}

function showAnswer(turn) {
  const { answer, body } = turn;
  const wasDown = isDown();
  const text = el('div', { class: 'text' }, ...markdown(answer.text));
  if (!answer.isDone) text.append(el('span', { class: 'cursor' }));
  body.replaceChildren(el('h2', { class: 'hidden' }, answer.model), text);
  if (answer.isDone) {
    const picture = turns.slice(0, turns.indexOf(turn) + 1).flatMap(({ pictures }) => pictures).at(-1);
    const boxes = picture ? boxesOf(answer.text) : [];
    if (boxes.length) body.append(boxedPicture(picture, boxes));
    if (answer.error) body.append(problemNode(answer.error, () => answerTurn(turn)));
    else if (!answer.text && !answer.isStopped) text.append(el('p', { class: 'small' }, t('empty')));
    const buttons = answer.text || !answer.error ? answerButtons(turn, text) : [];
    body.append(el('div', { class: 'actions' }, ...buttons, el('span', { class: 'small' }, figures(answer))));
    body.removeAttribute('aria-busy');
  }
  if (wasDown) scrollDown();
}

function problemNode(message, retry) {
  return el('div', { class: 'problem', role: 'alert' }, el('span', {}, message), textButton('retry', retry));
}

function answerButtons(turn, text) {
  const { answer } = turn;
  const source = iconButton('code', 'source', () => {
    const isSource = source.getAttribute('aria-pressed') === 'true';
    source.setAttribute('aria-pressed', String(!isSource));
    text.replaceChildren(...(isSource ? markdown(answer.text) : [el('pre', {}, answer.text)]));
  });
  source.setAttribute('aria-pressed', 'false');
  return [
    copyButton('copy', 'copyText', () => plainText(el('div', {}, ...markdown(answer.text))).trim()),
    copyButton('file', 'copyMarkdown', () => answer.text),
    source,
    iconButton('again', 'again', () => answerTurn(turn)),
  ];
}

function copyButton(name, key, text) {
  const node = iconButton(name, key, async () => {
    if (!(await copy(text()))) return;
    node.classList.add('copied');
    setTimeout(() => node.classList.remove('copied'), 1200);
  });
  return node;
}

function figures(answer) {
  const { model: name, usage, timings, seconds } = answer;
  const rate = timings?.predicted_per_second;
  return [
    name,
    usage && t('tokens', usage.completion_tokens),
    rate && t('rate', rate < 10 ? rate.toFixed(1) : Math.round(rate)),
    seconds !== undefined && t('first', seconds.toFixed(2)),
    ending(answer),
  ].filter(Boolean).join(' · ');
}

/** Returns how an answer ended if not by itself. */
function ending({ finish, reason, isStopped }) {
  if (isStopped) return t('stopped');
  return reason === 'repetition' ? t('repeated') : finish === 'length' ? t('cut') : '';
}

const isDown = () => find('main').scrollHeight - find('main').scrollTop - find('main').clientHeight < 80;

function scrollDown() {
  find('main').scrollTop = find('main').scrollHeight;
}

function showRunning() {
  const isFocused = [find('send'), find('stop')].includes(document.activeElement);
  find('send').hidden = Boolean(running);
  find('stop').hidden = !running;
  find('welcome').hidden = Boolean(find('talk').children.length);
  // a document has the same words
  find('about').hidden = Boolean(openDocuments.size);
  if (isFocused) find(running ? 'stop' : 'question').focus();
}

function newConversation() {
  for (const opened of [...openDocuments]) opened.close();
  dropAfter(0);
  running = null;
  find('talk').replaceChildren();
  stopEditing();
  choose([], '');
  showRunning();
  find('question').focus();
}

// ------------------------------------------------------------------------------------------------------------ documents

const PAGES_AT_ONCE = 4;
const THUMBNAIL_DPI = 60;
const THUMBNAILS = 16;
const openDocuments = new Set();

async function pagesOf(url, pages, dpi, signal) {
  return (await request('v1/documents/pages', { body: { url, pages, dpi }, signal })).json();
}

/** Opens a file that the browser cannot show: a document, or a picture, which it returns. */
async function openDocument(name, url) {
  notify(t('opening', name));
  const first = await pagesOf(url, `1-${THUMBNAILS}`, THUMBNAIL_DPI);
  notify('');
  const [page] = first.data;
  if (first.num_pages > 1 || /^data:application\/pdf/.test(url)) showDocument(new OpenDocument(name, url, first.num_pages), first.data);
  else if (page.error) throw new Problem(page.error);
  else return { name, url: page.url };
  return null;
}

function updateDocuments() {
  for (const opened of openDocuments) opened.update();
}

function showDocument(opened, pages) {
  openDocuments.add(opened);
  opened.addThumbnails(pages);
  listModels();
  find('talk').append(opened.node);
  showRunning();
  opened.node.scrollIntoView({ block: 'start' });
  opened.readButton.focus();
}

/** Returns what the text of a page depends on. */
const wayOfReading = () => JSON.stringify([model(), settings.pageQuestion, settings.dpi, systemMessage(), options()]);

class OpenDocument {
  constructor(name, url, count) {
    Object.assign(this, { name, url, count, read: new Map(), thumbnails: new Map(), reading: null });
    this.bar = el('progress', { max: count, value: 0, hidden: true, 'aria-label': name });
    this.progress = el('span', { class: 'small' }, t('pageCount', count));
    this.readButton = textButton('readAll', () => this.readPages(this.due()), 'filled');
    this.stopButton = textButton('stop', () => this.reading?.abort());
    this.stopButton.hidden = true;
    this.moreButton = textButton('more', () => this.more());
    this.saveButton = iconButton('save', 'saveText', () => this.save());
    this.copyButton = copyButton('copy', 'copyText', () => this.text());
    this.strip = el('ol', { class: 'thumbnails' });
    this.note = el('p', { class: 'small' });
    this.failures = el('p', { class: 'small' });
    this.texts = el('div', { class: 'texts' });
    const head = el('div', { class: 'head' }, icon('file'), el('h2', {}, name), this.progress, el('span', { class: 'space' }), this.copyButton,
      this.saveButton, iconButton('close', 'close', () => this.close()));
    const buttons = el('div', { class: 'buttons' }, this.readButton, this.stopButton, this.bar);
    this.node = el('section', { class: 'document', 'aria-label': name }, head, this.note, this.strip, this.moreButton, buttons,
      this.failures, this.texts);
    this.update();
  }

  close() {
    this.reading?.abort();
    openDocuments.delete(this);
    this.node.remove();
    showRunning();
  }

  /** Returns the pages that were not read with the model and the settings of now. */
  due() {
    const now = wayOfReading();
    const numbers = Array.from({ length: this.count }, (_, index) => index + 1);
    return numbers.filter((number) => !this.read.get(number)?.isRead || this.read.get(number).way !== now);
  }

  /** Returns the numbers and entries of the pages that were asked about, in their order. */
  entries() {
    return [...this.read].sort(([one], [other]) => one - other);
  }

  addThumbnails(pages) {
    for (const { number, url, error } of pages) {
      const image = url ? el('img', { src: url, alt: '' }) : el('span', { class: 'blank', title: error }, '!');
      const button = el('button', { type: 'button', click: () => this.choosePage(number) }, image, el('span', {}, String(number)));
      this.thumbnails.set(number, button);
      this.strip.append(el('li', {}, button));
    }
    this.update();
  }

  async more() {
    this.moreButton.disabled = true;
    await attempt(async () => {
      const first = this.thumbnails.size + 1;
      const { data } = await pagesOf(this.url, `${first}-${Math.min(first + THUMBNAILS - 1, this.count)}`, THUMBNAIL_DPI);
      this.addThumbnails(data);
    });
    this.moreButton.disabled = false;
  }

  choosePage(number) {
    if (!this.due().includes(number)) this.read.get(number).node.scrollIntoView({ block: 'nearest' });
    else this.readPages([number]);
  }

  /** Reads pages, some at a time, and shows each text as it comes. */
  async readPages(numbers) {
    if (this.reading || !model()) return;
    this.reading = new AbortController();
    const { signal } = this.reading;
    this.bar.max = numbers.length;
    this.bar.value = 0;
    this.update();
    await attempt(async () => {
      for (let rest = numbers; rest.length && !signal.aborted;) {
        const { data } = await pagesOf(this.url, rest.slice(0, PAGES_AT_ONCE).join(','), settings.dpi, signal);
        await Promise.all(data.map((page) => this.readPage(page, signal)));
        rest = rest.slice(data.length);
      }
    });
    this.reading = null;
    this.update();
    say(this.due().length ? this.failures.textContent : t('allRead'));
  }

  async readPage({ number, url, error }, signal) {
    const answer = { text: '', error, isDone: Boolean(error) };
    const entry = this.entry(number, answer);
    const content = [...pictureParts([{ url }]), { type: 'text', text: pageQuestion() }];
    const messages = [...systemMessage(), { role: 'user', content }];
    const show = () => entry.body.replaceChildren(...markdown(answer.text), ...this.endingNodes(number, answer));
    if (error) show();
    else await complete(messages, answer, signal, show);
    entry.isRead = !answer.isStopped && !answer.error;
    this.bar.value += 1;
    this.update();
  }

  /** Returns what stands below the text of a page that did not end by itself. */
  endingNodes(number, answer) {
    if (!answer.isDone) return [];
    if (answer.error) return [problemNode(answer.error, () => this.readPages([number]))];
    const words = ending(answer) || (answer.text ? '' : t('empty'));
    return words ? [el('p', { class: 'small' }, words)] : [];
  }

  /** Returns the entry of a page, whose text stands in the order of the pages. */
  entry(number, answer) {
    const body = el('div', { class: 'text' });
    const head = el('div', { class: 'head' }, el('h3', {}, t('page', number)), el('span', { class: 'space' }),
      iconButton('bubble', 'askPage', () => this.askAbout(number)), copyButton('copy', 'copyText', () => answer.text));
    const node = el('article', {}, head, body);
    this.read.get(number)?.node.remove();
    const later = this.entries().find(([one]) => one > number);
    this.texts.insertBefore(node, later ? later[1].node : null);
    const entry = { node, body, answer, isRead: false, way: wayOfReading() };
    this.read.set(number, entry);
    return entry;
  }

  /** Adds a page to the next question. Pages are asked for again, because hundreds of them would fill the memory. */
  async askAbout(number) {
    await attempt(async () => {
      const { data: [{ url, error }] } = await pagesOf(this.url, String(number), settings.dpi);
      if (error) throw new Problem(error);
      addPictures([{ url, name: `${this.name}, ${t('page', number)}` }]);
    });
  }

  update() {
    const isReading = Boolean(this.reading);
    const due = this.due();
    const numRead = this.count - due.length;
    const numFinished = this.entries().filter(([, { isRead }]) => isRead).length;
    const failed = this.entries().filter(([, { answer }]) => answer.error).map(([number]) => number);
    this.note.textContent = note();
    this.readButton.hidden = isReading || !due.length;
    this.readButton.disabled = !model();
    this.readButton.dataset.t = numFinished === this.count ? 'readAgain' : 'readAll';
    this.readButton.textContent = t(this.readButton.dataset.t);
    this.stopButton.hidden = this.bar.hidden = !isReading;
    this.moreButton.hidden = this.thumbnails.size >= this.count;
    this.saveButton.hidden = this.copyButton.hidden = !numFinished;
    this.progress.textContent = numRead || isReading ? t('progress', numRead, this.count) : t('pageCount', this.count);
    this.failures.textContent = failed.length ? t('failed', failed.join(', ')) : '';
    for (const [number, button] of this.thumbnails) {
      const isRead = !due.includes(number);
      button.classList.toggle('read', isRead);
      label(button, t(isRead ? 'goToPage' : 'readPage', number));
    }
  }

  /** Returns the texts of the pages in their order, with a form feed between pages. */
  text() {
    const finished = this.entries().filter(([, { isRead }]) => isRead);
    return finished.map(([, { answer }]) => `${answer.text.trimEnd()}\n`).join('\f');
  }

  save() {
    const url = URL.createObjectURL(new Blob([this.text()], { type: 'text/plain' }));
    el('a', { href: url, download: this.name.replace(/\.\w+$/, '') + '.txt' }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  }
}

// ------------------------------------------------------------------------------------------------------------- composer

/** Adds files, and shows a line for each that cannot be added. */
async function addFiles(files) {
  notify('');
  const [pictures, problems] = [[], []];
  for (const file of files) {
    try {
      const url = await dataUrl(file);
      const picture = (await isShown(file)) ? { name: file.name, url } : await openDocument(file.name, url);
      if (picture) pictures.push(picture);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      problems.push(`${file.name}: ${error.message.replace(/^the (image|document): /, '')}`);
    }
  }
  notify('');
  addPictures(pictures);
  notify([find('notice').textContent, ...problems].filter(Boolean).join('\n'));
}

/** Returns whether the browser shows a file as a picture. The server reads no SVG. */
async function isShown(file) {
  if (!file.type.startsWith('image/') || /svg|tiff/.test(file.type)) return false;
  return createImageBitmap(file).then((bitmap) => bitmap.close() ?? true, () => false);
}

/** Adds pictures to the next question, as many as the server takes. */
function addPictures(pictures) {
  const room = Math.max(pictureRoom() - chosen.pictures.length, 0);
  const [added, leftOut] = [pictures.slice(0, room), pictures.slice(room)];
  if (leftOut.length) notify(t('tooMany', pictureLimit(), leftOut.map(({ name }) => name).join(', ')));
  if (!added.length) return;
  choose([...chosen.pictures, ...added], find('question').value);
  find('question').focus();
}

/** Shows the pictures and the text of the next question. */
function choose(pictures, question) {
  chosen.pictures = pictures;
  find('question').value = question;
  find('pictures').replaceChildren(...pictures.map((picture) => el('li', {}, el('img', { src: picture.url, alt: picture.name }),
    iconButton('close', 'remove', () => choose(pictures.filter((one) => one !== picture), find('question').value), picture.name))));
  fitQuestion();
}

/** Fits the height of the question to its text, and offers questions while there is none. */
function fitQuestion() {
  const field = find('question');
  field.style.height = 'auto';
  field.style.height = `${Math.min(field.scrollHeight, 200)}px`;
  const offered = model() && chosen.pictures.length && !field.value ? card().scope.questions : [];
  find('offers').replaceChildren(...offered.map((text) => el('button', { type: 'button', class: 'plain', click: () => send(text) }, text)));
}

/** Asks the next question; of pictures without one, the first that fits. */
function send(written) {
  const { pictures, edited } = chosen;
  const question = written.trim() || (pictures.length && card()?.scope.questions[0]);
  // after a refused key, nothing else asks for it
  if (!model() && !nextLoad) loadModels();
  if (running || !model() || !question) return find('question').focus();
  if (takesOnePicture() && !pictures.length) return notify(t('needsPicture', model()));
  if (pictures.length > pictureRoom()) {
    return notify(t('tooManyAsked', pictureLimit(), pictureLimit() - pictureRoom() + pictures.length));
  }
  if (edited) dropAfter(turns.indexOf(edited));
  stopEditing();
  choose([], '');
  notify('');
  return askAll(question, pictures);
}

function editTurn(turn) {
  chosen.edited = turn;
  find('editing').hidden = false;
  choose(turn.pictures, turn.question);
  find('question').focus();
}

function stopEditing() {
  chosen.edited = null;
  find('editing').hidden = true;
}

/** Returns examples that fit the model: files, and questions about pictures. */
function fittingExamples() {
  if (!card()) return [];
  const { page_question: reads, questions } = card().scope;
  if (reads) return [['page.png', reads], ['invoice.png', reads], ['scan.pdf']];
  return questions.slice(0, 3).map((question) => ['scene.png', question]);
}

/** Offers the examples. */
function showExamples() {
  const examples = fittingExamples().map(([file, question]) => el('button', { type: 'button', class: 'card', click: () => tryExample(file, question) },
    file.endsWith('.pdf') ? el('span', { class: 'thumb' }, icon('file')) : el('img', { class: 'thumb', src: `examples/${file}`, alt: '' }),
    el('span', {}, question ?? file)));
  find('examples').replaceChildren(...examples);
  fitQuestion();
}

async function tryExample(file, question) {
  await attempt(async () => {
    const blob = await (await request(`examples/${file}`)).blob();
    const url = await dataUrl(blob);
    if (!question) return openDocument(file, url);
    choose([{ name: file, url }], '');
    return send(question);
  });
}

// ---------------------------------------------------------------------------------------------------------------- start

function on(id, event, listener) {
  find(id).addEventListener(event, listener);
}

function listen() {
  on('composer', 'submit', (event) => {
    event.preventDefault();
    send(find('question').value);
  });
  on('question', 'input', fitQuestion);
  on('question', 'keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(find('question').value);
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && !document.querySelector('dialog[open]')) running?.abort();
  });
  on('stop', 'click', () => running?.abort());
  on('new', 'click', newConversation);
  on('cancel-edit', 'click', () => {
    stopEditing();
    choose([], '');
  });
  for (const [button, input] of [['attach', 'files'], ['shoot', 'camera']]) {
    on(button, 'click', () => find(input).click());
    on(input, 'change', async ({ target }) => {
      const files = [...target.files];
      target.value = '';
      await addFiles(files);
    });
  }
  on('model', 'change', ({ target }) => {
    isModelChosen = true;
    keep({ model: target.value });
    showModel();
  });
  on('language', 'click', () => {
    keep({ language: language() === 'zh' ? 'en' : 'zh' });
    translate();
    showModel();
  });
  on('theme', 'click', () => {
    keep({ theme: isDark() ? 'light' : 'dark' });
    applyTheme();
  });
  on('open-settings', 'click', () => {
    fillSettings();
    find('settings').showModal();
  });
  on('settings', 'input', changeSetting);
  on('settings', 'close', () => model() || loadModels());
  on('reset', 'click', resetSettings);
  on('no-key', 'click', () => find('key').close());
  listenForFiles();
}

/** Takes pasted and dropped files. */
function listenForFiles() {
  const hasFiles = ({ dataTransfer }) => [...(dataTransfer?.types ?? [])].includes('Files');
  document.addEventListener('paste', ({ clipboardData }) => addFiles([...clipboardData.files]));
  document.addEventListener('dragover', (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    find('drop').hidden = false;
  });
  document.addEventListener('dragleave', ({ relatedTarget }) => {
    if (!relatedTarget) find('drop').hidden = true;
  });
  document.addEventListener('drop', (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    find('drop').hidden = true;
    addFiles([...event.dataTransfer.files]);
  });
}

applyTheme();
translate();
listen();
loadModels();
