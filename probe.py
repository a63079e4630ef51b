import torch
a=torch.randint(-128,128,(5,7),dtype=torch.int8); b=torch.randint(-128,128,(7,3),dtype=torch.int8)
for s in [((5,7),(7,3)),((0,7),(7,3)),((1,1),(1,1)),((5,0),(0,3)),((3,7),(7,0)),((1,384),(384,2))]:
    x=torch.randint(-128,128,s[0],dtype=torch.int8); y=torch.randint(-128,128,s[1],dtype=torch.int8)
    try:
        r=torch._int_mm(x,y); print(s, r.dtype, r.shape, torch.equal(r, x.int()@y.int()))
    except Exception as e: print(s, type(e), str(e)[:100])
w=torch.randint(-128,128,(3,7),dtype=torch.int8)
print(torch.equal(torch._int_mm(a,w.t()), a.int()@w.t().int()))
x=torch.full((2,70000),-128,dtype=torch.int8); y=torch.full((70000,2),-128,dtype=torch.int8)
print(torch._int_mm(x,y), 128*128*70000)
y=torch.full((140000,2),127,dtype=torch.int8);x=torch.full((2,140000),127,dtype=torch.int8)
print(torch._int_mm(x,y), 127*127*140000)
try: print(torch._int_mm(a.clone().to(torch.uint8), b))
except Exception as e: print(e)
print([n for n in dir(torch.ops.aten) if 'int8' in n or 'int_mm' in n or 'int4' in n])
print([n for n in dir(torch.ops.onednn)], [n for n in dir(torch.ops.quantized) if 'linear' in n])
