"""python try.py LAST [PRESET] [CHANGES]: executes the cells of sections 0..LAST (present files) in a temporary folder, as plain Python; needs MPLBACKEND=agg.
define cells of later sections are not executed."""
import re,glob,os,sys,time,linecache,tempfile
here=os.path.dirname(os.path.abspath(__file__))
os.environ.setdefault("MPLBACKEND","agg")
last=int(sys.argv[1]); preset=sys.argv[2] if len(sys.argv)>2 else "smoke"; changes=sys.argv[3] if len(sys.argv)>3 else "{}"
only=set(map(int,os.environ.get("ONLY","").split(","))) if os.environ.get("ONLY") else None
folder=tempfile.mkdtemp(); os.chdir(folder); os.environ["GPT_PRESET"]=preset; os.environ["HF_HUB_OFFLINE"]="1"
os.makedirs("checkpoints",exist_ok=True)
for f in ("recorded.json","pretrained.json","pretrained.pt"):
    q=here+"/recorded.json" if f=="recorded.json" else here+"/../checkpoints/"+f
    if os.path.exists(q): os.symlink(q,"checkpoints/"+f)
space={"__name__":"__main__"}
if os.environ.get("NB_CHDIR"): pass
for f in sorted(glob.glob(here+'/s[0-9][0-9].txt')):
    n=int(f[-6:-4])
    if n>last: break
    t0=time.time()
    for i,part in enumerate(re.split(r'^%%% ',open(f).read(),flags=re.M)[1:]):
        head,_,src=part.partition('\n')
        if head.startswith('md') or head.startswith('exercise') and 'check' not in head: continue
        if 'parameters' in head: src=f'preset={preset!r}\nchanges={changes}'
        name=f"<s{n:02d} cell {i}>"; linecache.cache[name]=len(src),None,src.splitlines(True),name
        t=time.time()
        try: exec(compile(src,name,'exec'),space)
        except BaseException:
            print("FAILED in",name); import traceback; traceback.print_exc(); print(src[:300]); sys.exit(1)
        if time.time()-t>2: print(f"   ({name}: {time.time()-t:.1f} s)")
    print(f"== section {n}: {time.time()-t0:.1f} s")
