"""python build.py [out.ipynb]: joins s00.txt … s16.txt (a missing one is left out) into a notebook.
Cell header lines: '%%% md [slide|frag]' or '%%% TAG [TAG] [slide|frag]', TAG: run define workshop panel check exercise exercise-check solution parameters.
Folding: workshop, panel, exercise-check, solution; check cells of more than eight lines; plus tag 'fold' (not written as a tag)."""
import json,sys,re,glob,hashlib,os
here=os.path.dirname(os.path.abspath(__file__))
out=sys.argv[1] if len(sys.argv)>1 else here+'/../gpt_from_scratch.ipynb'
base=here+'/../gpt_from_scratch.ipynb'
old=json.load(open(base,encoding='utf-8')); kept={}
for c in old['cells']:
    kept.setdefault((c['cell_type'],''.join(c['source'])),[]).append(c)
cells=[]; used=set()
for f in [here+'/head.txt']+sorted(glob.glob(here+'/s[0-9][0-9].txt')):
    text=open(f,encoding='utf-8').read()
    for part in re.split(r'^%%% ',text,flags=re.M)[1:]:
        head,_,src=part.partition('\n'); src=src.rstrip('\n')
        words=head.split(); kind='markdown' if words[0]=='md' else 'code'
        slide='skip'
        if words[-1] in('slide','frag','fragment'): slide={'slide':'slide','frag':'-','fragment':'fragment'}[words.pop()]
        tags=[w for w in words if w not in('md','fold')]
        lines=[l for l in src.splitlines() if l.strip() and not l.strip().startswith('#')]
        hidden=kind=="code" and (bool({"workshop","exercise-check","solution","fold"}&set(words)) or bool({"panel","check"}&set(words)) and len(lines)>8)
        if kind=='code' and 'solution' in words and 'verdicts' in src: hidden=False
        meta={'slideshow':{'slide_type':slide}}
        if hidden: meta['jupyter']={'source_hidden':True}
        if tags: meta['tags']=tags
        o=kept.get((kind,src),[]); o=o.pop(0) if o else None
        i=o['id'] if o else hashlib.sha256((f+src).encode()).hexdigest()[:8]
        while i in used: i=hashlib.sha256(i.encode()).hexdigest()[:8]
        used.add(i)
        c={'cell_type':kind,'id':i,'metadata':meta,'source':src.splitlines(True)}
        if kind=='code': c.update(execution_count=o['execution_count'] if o else None,outputs=o['outputs'] if o else [])
        cells.append(c)
meta={k:v for k,v in old['metadata'].items() if k!='widgets'}
json.dump({'cells':cells,'metadata':meta,'nbformat':4,'nbformat_minor':5},open(out,'w',encoding='utf-8'),ensure_ascii=False,indent=1)
open(out,'a').write('\n')
print(len(cells),'cells →',out)
